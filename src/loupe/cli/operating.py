"""Commands for models in use: the record, who is champion, scores of new images, and whether these drift."""

import json
from pathlib import Path
from typing import Annotated

import typer

from loupe.errors import ConfigError
from loupe.stages.entry import run_stage


def promote(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be decided, and change nothing.")] = False,
    override: Annotated[
        str | None, typer.Option(metavar="TASK", help="Make the trained classifier or detector champion regardless.")
    ] = None,
    reason: Annotated[str, typer.Option(help="Why it is overridden; kept in the audit.")] = "",
    stage_times: Annotated[
        Path | None, typer.Option(help="Seconds of each stage, as the flow writes them; kept on the runs.")
    ] = None,
) -> None:
    """Register what was trained, and decide who is champion."""
    from loupe import promotion  # torch and mlflow take seconds
    from loupe.model_card import attach_model_cards
    from loupe.stages.recording import record_stage_times

    if override is not None and dry_run:
        raise ConfigError("--override decides nothing that --dry-run could show: use one of them")
    if override is None and reason:
        raise ConfigError("--reason is for --override: a decision by the rules has reasons of its own")
    if override is not None:
        task = override
        run_stage(lambda params: promotion.override(task, reason))
    else:
        run_stage(lambda params: promotion.promote(params, dry_run))
    if not dry_run:
        run_stage(lambda params: attach_model_cards())
    if stage_times is not None:
        times = json.loads(stage_times.read_text(encoding="utf-8"))
        run_stage(lambda params: record_stage_times(times))


def history(
    name: Annotated[
        str | None, typer.Argument(help="classifier, detector, or a model of MLflow's registry; both, if left out.")
    ] = None,
) -> None:
    """Show who was champion, since when, by whose decision and why."""
    from loupe.history import show_history  # mlflow takes seconds

    run_stage(lambda params: show_history(name))


def rollback(
    reason: Annotated[str, typer.Option(help="Why; kept in the audit.")],
    task: Annotated[str | None, typer.Argument(help="classifier or detector; may be left out if only one is.")] = None,
) -> None:
    """Put the previous champion back; a second time, the one before it."""
    from loupe.history import roll_back  # mlflow takes seconds

    run_stage(lambda params: roll_back(task, reason))


def forget(
    name: Annotated[str, typer.Argument(help="classifier, detector, or a model of MLflow's registry.")],
    version: Annotated[str, typer.Argument(help="Its number.")],
    reason: Annotated[str, typer.Option(help="Why; kept in the audit.")],
) -> None:
    """Delete a version that is neither champion, previous champion nor challenger."""
    from loupe.history import forget as forget_version  # mlflow takes seconds

    run_stage(lambda params: forget_version(name, version, reason))


def runs(
    run_ids: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN]...", help="Compare these: ids, or their beginnings.")
    ] = None,
    experiment: Annotated[str | None, typer.Option(help="Of which data set; of the present one, if left out.")] = None,
    task: Annotated[str | None, typer.Option(help="Only classifier or detector.")] = None,
    last: Annotated[int, typer.Option(min=1, help="How many.")] = 20,
) -> None:
    """List trainings with their figures, the newest first, or compare some: what differs, figures side by side."""
    from loupe.runs import compare_runs, show_runs  # mlflow takes seconds

    if run_ids and (experiment or task):
        raise ConfigError("--experiment and --task are for the list: runs to compare are named by their ids alone")
    if run_ids:
        compare_runs(run_ids)
    else:
        show_runs(experiment, task, last)


def score(
    source: Annotated[Path, typer.Argument(help="An image, a folder of images, or a table with the column `path`.")],
    model: Annotated[
        str, typer.Option(help="An alias of this data's models, or one model: <name>@<alias> or <name>/<version>.")
    ] = "champion",
    out: Annotated[Path, typer.Option(help="The table: .parquet or .csv.")] = Path("scores/scores.parquet"),
    threshold: Annotated[float | None, typer.Option(help="Raw anomaly score above which an image is flagged.")] = None,
    false_alarm_rate: Annotated[
        float | None, typer.Option(min=0, max=1, help="Set the threshold for this rate, by the calibration images.")
    ] = None,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Keep each image's embedding as well.")] = False,
    maps: Annotated[Path | None, typer.Option(help="A folder for heat maps, one picture an image.")] = None,
) -> None:
    """Score images by registered models: one row an image, written in parts that a stopped run goes on from."""
    from loupe.scoring import Request, score_and_tell  # torch and mlflow take seconds

    run_stage(
        lambda params: score_and_tell(
            Request(source, model, out, threshold, false_alarm_rate, embeddings=embeddings, maps=maps)
        )
    )


def drift(
    source: Annotated[
        Path, typer.Argument(help="A table that `loupe score --embeddings` wrote, or a folder of images to score.")
    ],
    model: Annotated[
        str, typer.Option(help="An alias of this data's models, or one model: <name>@<alias> or <name>/<version>.")
    ] = "champion",
    images: Annotated[
        Path | None, typer.Option(help="Where the table's paths start, for pictures; the table's folder, if left out.")
    ] = None,
) -> None:
    """Compare recent images with those a model is known by: whether they drifted, how far, and which moved most."""
    from loupe.drift import check_drift  # torch and mlflow take seconds

    run_stage(lambda params: check_drift(params, source, model, images))
