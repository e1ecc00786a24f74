"""Retraining as a Prefect flow: all stages on the newest images, in a copy of the project, then promotion.

The copy is a worktree of its own (see `pipelines.worktree`), so that nobody's working copy changes. The registry is the
project's: promotion decides as it does after `make run`. Where anything was computed, the new params.yaml and dvc.lock
are committed on a branch, `retraining/<time>`: after `git merge`, `make run` takes all of it from DVC's cache. Where
nothing changed, there is no branch. A run that was cancelled or killed leaves what it finished in DVC's cache, and what
its training goes on from in data/memory/retraining; the next one takes it up.

Two never run at once: each deployment has a concurrency limit of one, and a lock holds across deployments and people.
The result is an artifact, and the event `loupe.retraining.finished` with its outcome: unchanged, retrained or failed.
"""

import sys
from typing import Any

from filelock import FileLock, Timeout
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event
from prefect.states import Cancelled, Completed, Failed, State

from loupe.commands import LOCK as COMMANDS_LOCK
from loupe.commands import run_command
from loupe.config import load_params
from loupe.errors import LoupeError, PipelineError
from loupe.summary import format_markdown, write_summary
from pipelines.training import StageTime, run_stages
from pipelines.worktree import commit_locks, find_pulled, open_worktree, read_locks

LOCK = COMMANDS_LOCK.with_name("retraining.lock")
FINISHED = "loupe.retraining.finished"
RESOURCE = {"prefect.resource.id": "loupe.retraining", "prefect.resource.name": "retraining"}


@flow(name="retraining", description="All stages on the newest images, in a copy of the project, then promotion.")
def retrain() -> State[None]:
    """Retrain, unless another one does."""
    LOCK.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(LOCK.resolve(), timeout=0):
            return _retrain_alone()
    except Timeout:
        return Cancelled(message="another retraining of this project is running: this one is left out")
    except LoupeError as error:
        _publish("failed", f"Retraining failed: {error}", reason=str(error))
        return Failed(message=str(error), data=error)


def _retrain_alone() -> State[None]:
    with open_worktree():
        fetch_data(load_params().pipeline.stage_timeout_seconds)
        before = read_locks()
        times = run_stages()
        summary = write_summary()
        decisions = {key: value for key, value in summary.items() if key.endswith("/decision")}
        branch = commit_locks(_describe_commit(decisions)) if read_locks() != before else None
    outcome = "unchanged" if branch is None else "retrained"
    report = [_describe_outcome(branch), format_markdown(summary), _format_times(times)]
    _publish(outcome, "\n\n".join(report), branch=branch, **decisions)
    return Completed(name=outcome.capitalize(), message=report[0])


@task(cache_policy=NO_CACHE)
def fetch_data(timeout_seconds: int) -> None:
    """Bring what DVC holds to the copy: the newest images from a remote, and from its cache what is there."""
    log, pulled = get_run_logger(), find_pulled()
    if pulled is not None:
        for line in run_command(["dvc", "pull", pulled], timeout_seconds):
            log.info(line)
    try:
        for line in run_command(["dvc", "checkout", "--quiet"], timeout_seconds):
            log.debug(line)
    except PipelineError:
        log.info("DVC's cache does not hold all that dvc.lock names: what is needed of the rest is computed again")


def _describe_commit(decisions: dict[str, Any]) -> str:
    told = "; ".join(f"{key.partition('/')[0]} {decision}" for key, decision in decisions.items())
    return f"Retrained: {told}" if told else "Retrained"


def _describe_outcome(branch: str | None) -> str:
    if branch is None:
        return "Nothing changed, and nothing was computed."
    return f"Retrained: branch `{branch}` has the new params.yaml and dvc.lock (`git merge {branch}`, `make run`)."


def _format_times(times: dict[str, StageTime]) -> str:
    rows = [f"| {name} | {'unchanged' if taken.unchanged else ''} | {taken.seconds} |" for name, taken in times.items()]
    return "\n".join(["## Stages", "", "| stage | | seconds |", "| --- | --- | ---: |", *rows])


def _publish(outcome: str, markdown: str, **facts: Any) -> None:
    create_markdown_artifact(markdown, key="retraining", description=f"outcome: {outcome}")
    emit_event(FINISHED, RESOURCE, payload={"outcome": outcome, **facts})


def main() -> None:
    """Run the flow here and now, without a server."""
    state = retrain(return_state=True)
    if not state.is_completed():
        sys.exit(f"error: {state.message}")
    print(state.message)  # noqa: T201


if __name__ == "__main__":
    main()
