"""The main job as a Prefect flow: every stage of dvc.yaml in its order, then promotion, then the summary."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import networkx as nx
from dvc.repo import Repo
from filelock import FileLock
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed, State

from loupe.config import load_params
from loupe.errors import LoupeError, PipelineError
from loupe.summary import format_markdown, print_summary, write_summary

LOCK = Path(".dvc/tmp/loupe.lock")
GRACE_SECONDS = 5
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
    timeout_seconds = load_params().pipeline.stage_timeout_seconds
    for stage in list_stages():
        state = run_stage.with_options(name=stage.rpartition(":")[2])(stage, timeout_seconds, return_state=True)
        if not state.is_completed():
            return _fail(_get_reason(state))
    state = promote(timeout_seconds, return_state=True)
    if not state.is_completed():
        return _fail(_get_reason(state))
    summary = write_summary()
    create_markdown_artifact(format_markdown(summary), key="training-summary")
    return Completed(message="everything is up to date")


@task(cache_policy=NO_CACHE)
def run_stage(stage: str, timeout_seconds: int) -> State[None]:
    """Reproduce one stage; a stage that is up to date ends as `Unchanged`."""
    command = ["dvc", "--wait-for-lock", "repro", "--single-item", stage]
    name = None
    try:
        for line in run_command(command, timeout_seconds):
            name = "Unchanged" if "didn't change, skipping" in line else name
            if not line.startswith(DVC_ADVICE):
                get_run_logger().info(line)
    except PipelineError as error:
        return _fail(error)
    return Completed(name=name)


@task(cache_policy=NO_CACHE)
def promote(timeout_seconds: int) -> State[None]:
    """Register what was trained, and decide who is champion."""
    try:
        for line in run_command(["loupe", "promote"], timeout_seconds):
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


def run_command(command: list[str], timeout_seconds: int) -> Iterator[str]:
    """Run a program of this environment, alone among those of this project, and give its lines as they come.

    It gets a process group of its own, which ends with it, with its time, or when this process is interrupted.

    Raises:
        PipelineError: if it fails or runs out of time.
    """
    binaries = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}", "PYTHONUNBUFFERED": "1"}
    LOCK.parent.mkdir(parents=True, exist_ok=True)
    reason = ""
    with (
        FileLock(LOCK),
        subprocess.Popen(
            [str(binaries / command[0]), *command[1:]],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process,
        _ending_group(process, timeout_seconds) as ran_out,
    ):
        assert process.stdout is not None  # it is a pipe
        for line in process.stdout:
            if line.startswith(("error: ", "ERROR: ")):
                reason = reason or line.partition(" ")[2].strip()
            if line.strip():
                yield line.rstrip()
    if ran_out():
        raise PipelineError(f"`{' '.join(command)}` ran longer than pipeline.stage_timeout_seconds ({timeout_seconds})")
    if process.returncode:
        raise PipelineError(reason or f"`{' '.join(command)}` ended with {process.returncode}; its log says why")


@contextmanager
def _ending_group(process: subprocess.Popen[str], timeout_seconds: int) -> Iterator[Callable[[], bool]]:
    """Ends the process's whole group on the way out, or when its time is up; gives a question whether that was so."""
    ran_out = threading.Event()

    def end() -> None:
        ran_out.set()
        _end_group(process)

    timer = threading.Timer(timeout_seconds, end)
    timer.start()
    try:
        yield ran_out.is_set
    finally:
        timer.cancel()
        if process.poll() is None:
            try:
                process.wait(GRACE_SECONDS if sys.exc_info()[0] is None else 0)
            except subprocess.TimeoutExpired:
                _end_group(process)


def _end_group(process: subprocess.Popen[str]) -> None:
    """Ask the group to end, then make it."""
    for signal_number, patience_seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, signal_number)
            process.wait(patience_seconds)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def main() -> None:
    """Run the flow, and end with the table or with the sentence that says what failed."""
    try:
        state = train(return_state=True)
        if not state.is_completed():
            raise _get_reason(state)
        print_summary(write_summary())
    except LoupeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
