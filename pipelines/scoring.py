"""Scoring as a Prefect flow: a table of scores, whether the images drift from those trained on, and an event if so.

The event `loupe.drift.found` starts the deployment `retraining-on-drift` of prefect.yaml.
"""

import json
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event
from prefect.states import Completed, Failed, State

from loupe.commands import run_command
from loupe.config import load_params
from loupe.data.sources import name_source
from loupe.errors import LoupeError
from loupe.stages.files import REPORTS

SCORES = Path("scores")
DRIFT = REPORTS / "drift.json"
DRIFT_FOUND = "loupe.drift.found"


@flow(name="scoring", description="Scores of a folder of images by a registered model, and whether they drift.")
def score(path: str, model: str = "champion") -> State[None]:
    """Write scores/<name of the folder>.parquet and reports/drift.json.

    Args:
        path: what `loupe score` takes: an image, a folder, or a table.
        model: an alias of this data's models, or one model of MLflow's registry.
    """
    source = Path(path)
    table, root = SCORES / f"{name_source(source)}.parquet", source if source.is_dir() else source.parent
    timeout_seconds = load_params().pipeline.stage_timeout_seconds
    try:
        for command in (
            ["loupe", "score", path, "--model", model, "--embeddings", "--out", str(table)],
            ["loupe", "drift", str(table), "--model", model, "--images", str(root)],
        ):
            run_program.with_options(name=command[1])(command, timeout_seconds)
    except LoupeError as error:
        return Failed(message=str(error), data=error)
    return tell_of_drift(table, json.loads(DRIFT.read_text(encoding="utf-8")))


@task(cache_policy=NO_CACHE)
def run_program(command: list[str], timeout_seconds: int) -> None:
    """Run a command of Loupe that only reads what training made, beside whatever runs."""
    for line in run_command(command, timeout_seconds, alone=False):
        get_run_logger().info(line)


def tell_of_drift(table: Path, report: dict[str, Any]) -> State[None]:
    """Publish what reports/drift.json says of a table of scores, and emit the event if it drifts."""
    verdict = str(report["drift/verdict"])
    rows = [f"| {key} | {value} |" for key, value in report.items() if not isinstance(value, dict | list)]
    markdown = "\n".join([f"`{table}`: {verdict}", "", "| | |", "| --- | --- |", *rows])
    create_markdown_artifact(markdown, key="scoring", description=verdict)
    if not report["drift/is_drifted"]:
        return Completed(message=verdict)
    resource = {"prefect.resource.id": f"loupe.scores.{table.stem}", "prefect.resource.name": table.as_posix()}
    emit_event(DRIFT_FOUND, resource, payload={"table": table.as_posix(), "verdict": verdict})
    return Completed(name="Drifted", message=verdict)
