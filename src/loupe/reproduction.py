"""Making a training again from its record: the same commit, changes, params and data; are the figures the same?

It is done in a git worktree below .dvc/tmp, where MLflow's store is still the project's and DVC's cache is shared. What
comes before the training is restored from that cache or computed; training and test are always computed, and left out
of the cache, so that nobody is given the copy for the original.
"""

import json
import math
import shlex
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.console import Console
from ruamel.yaml import YAML

from loupe.commands import run_command
from loupe.data.manifest import compute_data_digest, load_table
from loupe.errors import ConfigError, PipelineError, TrackingError
from loupe.stages.files import DOWNLOADS, MANIFEST, MODELS, REPORTS, RUN, SKIPPED, SPLITS
from loupe.tracking.records import (
    DATA_TAG,
    SHORT,
    Record,
    find_record,
    link_reproduction,
    load_environment,
    load_patch,
)
from loupe.tracking.runs import flatten_params, open_store
from loupe.worktree import WITHIN, link, link_source, open_commit, run_git, share_cache

PLACE = Path(".dvc/tmp/reproduction")
FOLDER = PLACE / WITHIN
LOCK = Path(".dvc/tmp/reproduction.lock")
BEFORE_TRAINING = "augment"  # the last stage that a training rests on
SECONDS = 24 * 60 * 60  # for a stage: the run says nothing of how long it may take
TOLERANCE = 1e-9  # relative
# What DVC says to somebody who runs a stage by hand.
DVC_ADVICE = ("To track the changes", "\tgit add", "To enable auto staging", "\tdvc config", "Use `dvc push`")


@dataclass(frozen=True)
class Outcome:
    """`figures` are those that differ: name, then the recorded value and the new one, None where there is none.

    `reasons` are what else differs that figures may depend on, in words.
    """

    run_id: str
    figures: Mapping[str, tuple[float | None, float | None]]
    reasons: Sequence[str]


def reproduce(run_id: str, force: bool, dry_run: bool) -> bool:
    """Make a training again and compare, or only say how; gives whether the figures are the same.

    Args:
        run_id: or the beginning of it.
        force: go on where the data or params differ, or where changes of the code were not recorded.

    Raises:
        TrackingError: if the store does not hold the training, or it can't be made again.
        PipelineError: if git, DVC or a stage fails.
    """
    console = Console(highlight=False)

    def tell(line: str) -> None:
        if not line.startswith(DVC_ADVICE):
            console.print(line, markup=False, soft_wrap=True)

    client = open_store()
    record = find_record(client, run_id)
    patch = load_patch(record)
    check_record(record, patch, force)
    tell(describe_steps(record, patch))
    if dry_run:
        return True
    LOCK.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(LOCK), open_copy(record, patch):
        check_copy(record, force, tell)
        figures = make_again(record.task, tell)
        made_id: str = json.loads((MODELS / record.task / RUN).read_text())["run_id"]
    link_reproduction(client, made_id, record)
    environments = [load_environment(one) for one in (record, find_record(client, made_id))]
    outcome = Outcome(made_id, compare_figures(record.figures, figures), compare_environments(*environments))
    tell(describe_outcome(record, outcome))
    return not outcome.figures


def check_record(record: Record, patch: str | None, force: bool) -> None:
    """Refuse a run that ended without figures, whose commit is not here, or whose changes are not known.

    Raises:
        TrackingError: with what is missing.
    """
    name = f"run {record.run_id[:SHORT]}"
    if record.status != "FINISHED" or not record.figures:
        why = f"ended as {record.status}" if record.status != "FINISHED" else "was not tested"
        raise TrackingError(f"{name} {why}: there are no figures to compare with")
    if record.commit is None:
        raise TrackingError(f"{name} was not trained in a repository of git: nobody knows its code")
    known = subprocess.run(["git", "cat-file", "-e", f"{record.commit}^{{commit}}"], capture_output=True, check=False)
    if known.returncode:
        raise TrackingError(f"commit {record.commit} of {name} is not in this repository: `git fetch` where it is")
    if not record.is_clean and patch is None and not force:
        raise TrackingError(
            f"{name} was trained with changes that were not committed and not recorded either; with --force it is "
            "made again from the commit alone"
        )


def describe_steps(record: Record, patch: str | None) -> str:
    """What is done, as one would type it."""
    num_lines = len((patch or "").splitlines())
    arguments = [_build_command(stage) for stage in _list_stages(record.task)]
    return "\n".join(
        [
            f"run {record.run_id}, the {record.task} of {record.experiment} of {record.start:%Y-%m-%d %H:%M:%S} UTC:",
            f"  git worktree add --detach {FOLDER} {record.commit}",
            *([f"  git -C {FOLDER} apply   # code/changes.patch of the run, {num_lines} lines"] if patch else []),
            f"  dvc repro {BEFORE_TRAINING}   # in {FOLDER}, as all that follows; then the params are compared",
            f"  # data: {record.params.get('ingest.source', 'not recorded')}, digest {record.tags.get(DATA_TAG, '')}",
            *(f"  {shlex.join(command)}" for command in arguments),
        ]
    )


def _list_stages(task: str) -> tuple[str, str]:
    return f"train_{task}", f"evaluate_{task}"


def _build_command(stage: str) -> list[str]:
    return ["dvc", "repro", "--force", "--single-item", "--no-commit", stage]


@contextmanager
def open_copy(record: Record, patch: str | None) -> Iterator[None]:
    """Work in a fresh worktree of the run's commit and changes; it is removed in the end.

    Raises:
        PipelineError: if git can't make it, or the changes don't fit.
    """
    assert record.commit is not None  # checked before
    with open_commit(record.commit, PLACE) as project:
        if patch:
            run_git("apply", "--whitespace=nowarn", "-", said=patch)
        share_cache(project)
        if (project / DOWNLOADS).exists():
            link(DOWNLOADS, project / DOWNLOADS)
        link_source(project, PLACE, Path(_load_values()["ingest"]["source"]))
        yield


def check_copy(record: Record, force: bool, tell: Callable[[str], None]) -> None:
    """Bring what comes before the training up to date, and refuse params or data that are not those of the run.

    Raises:
        ConfigError: with what differs, unless it is forced.
    """
    differing = compare_params(record.params, _load_values())
    if differing:
        _object(
            f"the params of the commit and its changes are not those of the run: {'; '.join(differing)}", force, tell
        )
    for command in (["dvc", "checkout", "--quiet", "--allow-missing"], ["dvc", "repro", BEFORE_TRAINING]):
        for line in run_command(command, SECONDS):
            tell(line)
    rows = load_table(MANIFEST).drop_duplicates("image_id").merge(load_table(SPLITS), on="image_id")
    digest, known = compute_data_digest(rows), record.tags.get(DATA_TAG, "")
    if digest != known:
        _object(
            f"the data are not those of the run any more: the digest of images, labels and splits is {digest[:SHORT]}, "
            f"and was {known[:SHORT]}",
            force,
            tell,
        )


def _object(reason: str, force: bool, tell: Callable[[str], None]) -> None:
    if not force:
        raise ConfigError(f"{reason}; with --force it is made again all the same, and compared")
    tell(f"forced: {reason}")


def _load_values() -> dict[str, Any]:
    """Those of params.yaml as they stand there: other commits may know other keys."""
    values: dict[str, Any] = YAML(typ="safe").load(Path("params.yaml"))
    return values


def compare_params(recorded: Mapping[str, str], values: Mapping[str, Any]) -> list[str]:
    """What differs between the params of a run and those of a file, in words; what a run chose itself is no param."""
    flat = flatten_params(values)
    return [
        f"{key} is {flat.get(key)!r} and was {value!r}"
        for key, value in recorded.items()
        if not key.startswith("chosen.") and not _is_same(flat.get(key), value)
    ]


def _is_same(value: object, text: str) -> bool:
    """Whether MLflow wrote the value so; 1 may have become 1.0."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(text) == value
        except ValueError:
            return False
    return str(value) == text


def make_again(task: str, tell: Callable[[str], None]) -> dict[str, float]:
    """Train and test in the current folder, whatever DVC knows of it; gives the figures.

    Raises:
        PipelineError: if a stage fails, or the data train no such model any more.
    """
    for stage in _list_stages(task):
        for line in run_command(_build_command(stage), SECONDS):
            tell(line)
    if (MODELS / task / SKIPPED).exists():
        reason = json.loads((MODELS / task / SKIPPED).read_text())["reason"]
        raise PipelineError(f"the data train no {task} any more: {reason}")
    figures: dict[str, float] = json.loads((REPORTS / "metrics" / f"{task}.json").read_text())
    return figures


def compare_figures(
    recorded: Mapping[str, float], made: Mapping[str, float]
) -> dict[str, tuple[float | None, float | None]]:
    """Those that are not the same, to within TOLERANCE."""
    return {
        name: (recorded.get(name), made.get(name))
        for name in sorted({*recorded, *made})
        if name not in recorded or name not in made or not math.isclose(recorded[name], made[name], rel_tol=TOLERANCE)
    }


def compare_environments(recorded: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """What differs of packages and device, in words."""
    if not recorded or not present:
        return ["the packages and the device of the run were not recorded"]
    return [
        f"{key} was {recorded.get(key)} and is {present.get(key)}"
        for key in sorted({*recorded, *present})
        if recorded.get(key) != present.get(key)
    ]


def describe_outcome(record: Record, outcome: Outcome) -> str:
    """What a person reads in the end."""
    runs = f"run {record.run_id[:SHORT]}, made again as {outcome.run_id[:SHORT]}"
    if not outcome.figures:
        return f"{runs}: the same figures, all {len(record.figures)} of them"
    lines = [f"{runs}: {len(outcome.figures)} of {len(record.figures)} figures differ"]
    lines += [f"  {name}: was {_write(was)}, is {_write(now)}" for name, (was, now) in outcome.figures.items()]
    if outcome.reasons:
        return "\n".join([*lines, "What else differs, and may be why:", *(f"  {reason}" for reason in outcome.reasons)])
    return "\n".join([*lines, "Packages and device are the same."])


def _write(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.10g}"
