"""The main job as a Prefect flow: every stage of dvc.yaml in its order, then promotion, then the summary."""

import time
from dataclasses import asdict, dataclass
from typing import Any

import networkx as nx
from dvc.repo import Repo
from prefect import Task, flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed, State

from loupe.commands import alone_in_folder, run_command
from loupe.config import load_params
from loupe.errors import PipelineError
from loupe.stages.entry import ending_in_a_sentence, save_json
from loupe.stages.files import REPORTS
from loupe.summary import format_markdown, print_summary, write_summary

STAGE_TIMES = REPORTS / "stage_times.json"
UNCHANGED = "Unchanged"  # name of the state of what had nothing to do

# What DVC says after every stage, for somebody who runs one by hand.
DVC_ADVICE = (
    "To track the changes",
    "\tgit add",
    "To enable auto staging",
    "\tdvc config",
    "Use `dvc push`",
    "Data and pipelines are up to date",
)


@flow(name="training", description="From images to a promoted classifier and anomaly detector.")
def train() -> State[None]:
    """Bring every stage up to date, one after another; the first that fails ends the flow."""
    try:
        run_stages()
    except PipelineError as error:
        return _fail(error)
    create_markdown_artifact(format_markdown(write_summary()), key="training-summary")
    return Completed(message="everything is up to date")


@dataclass(frozen=True)
class StageTime:
    """How long a stage took, and whether it had nothing to do."""

    seconds: float
    unchanged: bool


def run_stages() -> dict[str, StageTime]:
    """Run every stage and then promotion, as tasks of the flow that asks; their times go to reports/stage_times.json.

    Raises:
        PipelineError: what the first that failed said; those after it are not run.
    """
    timeout_seconds = load_params().pipeline.stage_timeout_seconds
    times: dict[str, StageTime] = {}
    try:
        for stage in list_stages():
            name = stage.rpartition(":")[2]
            times[name] = _take_time(run_stage.with_options(name=name), stage, timeout_seconds)
    finally:
        save_json({name: asdict(taken) for name, taken in times.items()}, STAGE_TIMES)
    times["promote"] = _take_time(promote, timeout_seconds)
    return times


def _take_time(run: Task[..., State[None]], *arguments: object) -> StageTime:
    start = time.monotonic()
    state: State[Any] = run(*arguments, return_state=True)
    if not state.is_completed():
        raise _get_reason(state)
    return StageTime(round(time.monotonic() - start, 1), unchanged=state.name == UNCHANGED)


@task(cache_policy=NO_CACHE)
def run_stage(stage: str, timeout_seconds: int) -> State[None]:
    """Reproduce one stage; a stage that is up to date ends as UNCHANGED."""
    command = ["dvc", "--wait-for-lock", "repro", "--single-item", stage]
    name = None
    try:
        for line in run_command(command, timeout_seconds):
            name = UNCHANGED if "didn't change, skipping" in line else name
            if not line.startswith(DVC_ADVICE):
                get_run_logger().info(line)
    except PipelineError as error:
        return _fail(error)
    return Completed(name=name)


@task(cache_policy=NO_CACHE)
def promote(timeout_seconds: int) -> State[None]:
    """Register what was trained, and decide who is champion."""
    try:
        for line in run_command(["loupe", "promote", "--stage-times", str(STAGE_TIMES)], timeout_seconds):
            get_run_logger().info(line)
    except PipelineError as error:
        return _fail(error)
    return Completed()


def _fail(error: PipelineError) -> State[None]:
    """A failed state that carries its reason as data: Prefect prints a state's message again at every level."""
    return Failed(message="the log of the stage says why", data=error)


def _get_reason(state: State[Any]) -> PipelineError:
    reason = state.result(raise_on_failure=False)
    return reason if isinstance(reason, PipelineError) else PipelineError(state.message or state.name)


def list_stages() -> list[str]:
    """Addresses of the stages of dvc.yaml and of what they depend on, each after its dependencies, as DVC has them."""
    with Repo() as repo:
        graph = repo.index.graph  # from a stage to what it depends on
        order = {stage: position for position, stage in enumerate(repo.index.stages)}
        main = {stage for stage in graph if stage.path_in_repo == "dvc.yaml"}
        needed = main.union(*(nx.descendants(graph, stage) for stage in main))
        ordered = nx.lexicographical_topological_sort(graph.subgraph(needed).reverse(), key=order.__getitem__)
        return [stage.addressing for stage in ordered]


def main() -> None:
    """Run the flow, and end with the table or with the sentence that says what failed."""
    with ending_in_a_sentence(), alone_in_folder():
        state = train(return_state=True)
        if not state.is_completed():
            raise _get_reason(state)
        print_summary(write_summary())


if __name__ == "__main__":
    main()
