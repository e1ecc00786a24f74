"""Trainings under other params as DVC experiments: each in a copy of the project, which itself stays as it is."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.repo.experiments.refs import ExpRefInfo

from loupe.commands import run_command
from loupe.config import Params
from loupe.errors import PipelineError, TrackingError
from loupe.stages.files import BUILT_IN, HISTORY, LISTING, MODELS, REPORTS, RUN, SKIPPED, DataSet
from loupe.tracking.runs import connect, name_store

MLFLOW_PAGE = "http://127.0.0.1:5000"  # where `make ui` opens it

# What DVC says of its own files, and to somebody who runs one experiment by hand.
ASIDES = (
    "WARNING: No file hash info found",
    "Generating lock file",
    "Updating lock file",
    "To apply the results of an experiment",
    "\tdvc exp apply",
)


@dataclass(frozen=True)
class Experiment:
    """The name under which DVC keeps it, and values by dotted key that replace those of params.yaml."""

    name: str
    changes: Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """What an experiment left: test figures under flat names, a row an epoch, the MLflow run, data set and model."""

    figures: dict[str, float]
    history: pd.DataFrame
    run_id: str
    data_set: DataSet
    model_uri: str = ""


@dataclass(frozen=True)
class Comparison:
    """MLflow runs that belong together: the experiment that has them, MLflow's page with them, and their seconds.

    The seconds are by the name of the run, from its start to its end, with logging the model.
    """

    mlflow_id: str
    address: str
    seconds: dict[str, float]


def run_experiments(
    experiments: Sequence[Experiment], task: str, params: Params, tell: Callable[[str], None]
) -> list[Result]:
    """Train and test one kind of model once for each experiment; what DVC's cache holds is not computed again.

    Args:
        task: `classifier` or `detector`.
        params: those of params.yaml.
        tell: is given each line of the log as it comes.

    Raises:
        PipelineError: if one fails, with its name and its stage's sentence; those after it are not run.
    """
    results = []
    for experiment, outcome in zip(experiments, try_experiments(experiments, task, params, tell), strict=True):
        if isinstance(outcome, PipelineError):
            raise PipelineError(f"{experiment.name}: {outcome}") from outcome
        results.append(outcome)
    return results


def try_experiments(
    experiments: Sequence[Experiment], task: str, params: Params, tell: Callable[[str], None]
) -> Iterator[Result | PipelineError]:
    """The same, but one that fails gives the error with its stage's sentence, and those after it are run.

    Raises:
        PipelineError: if none can be run at all.
    """
    _check_cache()
    for number, experiment in enumerate(experiments, 1):
        tell(f"experiment {number} of {len(experiments)}: {experiment.name}")
        try:
            for line in _run(experiment, task, params):
                tell(line)
            outcome: Result | PipelineError = _load_result(experiment.name, task)
        except PipelineError as error:
            outcome = error
        yield outcome


def _check_cache() -> None:
    """At its end an experiment opens what dvc.lock names, and would fail for lack of it after all the computing."""
    with _open_repo() as repo:
        outs = [out for stage in repo.index.stages if stage.path_in_repo == "dvc.yaml" for out in stage.outs]
        lacking = [str(out) for out in outs if out.hash_info and not repo.cache.local.exists(out.hash_info.value)]
    if lacking:
        raise PipelineError(
            f"dvc.lock names {lacking[0]}, which DVC's cache does not hold: bring everything up to date first, with "
            "`loupe run` or `dvc repro`"
        )


def _run(experiment: Experiment, task: str, params: Params) -> Iterator[str]:
    """One of the same name from an earlier time is replaced; `--force` would do that too, but compute all anew."""
    with _open_repo() as repo:
        scm, ref = repo.experiments.scm, _build_ref(repo, experiment.name)
        if scm.get_ref(ref):
            scm.remove_ref(ref)
    changes = {**_locate_source(params), **experiment.changes}
    command = ["dvc", "--wait-for-lock", "exp", "run", "--temp", "--name", experiment.name]
    for key, value in changes.items():
        command += ["--set-param", f"{key}={json.dumps(value, ensure_ascii=False)}"]
    for line in run_command([*command, f"evaluate_{task}"], params.pipeline.stage_timeout_seconds):
        if not line.startswith(ASIDES):
            yield line


def _locate_source(params: Params) -> dict[str, str]:
    """The copy has what git and DVC hold, and other images are found by their whole path alone."""
    source = Path(params.ingest.source)
    return {} if source.is_absolute() or source == BUILT_IN else {"ingest.source": source.resolve().as_posix()}


def _load_result(name: str, task: str) -> Result:
    with _open_repo() as repo:
        commit = repo.experiments.scm.get_ref(_build_ref(repo, name))
    with _open_repo(commit) as repo:
        read, model = repo.dvcfs.read_text, MODELS / task
        if repo.dvcfs.exists((model / SKIPPED).as_posix()):
            reason = json.loads(read((model / SKIPPED).as_posix()))["reason"]
            raise PipelineError(f"this data trains no {task}: {reason}")
        run = json.loads(read((model / RUN).as_posix()))
        return Result(
            figures=json.loads(read((REPORTS / "metrics" / f"{task}.json").as_posix())),
            history=pd.read_csv(StringIO(read((model / HISTORY).as_posix()))),
            run_id=run["run_id"],
            data_set=DataSet(**json.loads(read(LISTING.as_posix()))),
            model_uri=run["model_uri"],
        )


def _build_ref(repo: Repo, name: str) -> str:
    """Experiments belong to the commit that they start from."""
    return str(ExpRefInfo(repo.experiments.scm.get_rev(), name))


@contextmanager
def _open_repo(revision: str | None = None) -> Iterator[Repo]:
    """The project as it is, or as it was at a revision."""
    try:
        with Repo(rev=revision) as repo:
            yield repo
    except DvcException as error:
        raise PipelineError(f"DVC: {error}") from error


def name_runs(results: Mapping[str, Result], tag: str) -> Comparison:
    """Name the MLflow runs of one data set, and tag them by their names, so that they are told apart side by side.

    Raises:
        TrackingError: if the store does not hold a run.
    """
    data_set = next(iter(results.values())).data_set
    client = connect(data_set.name)
    known = client.get_experiment_by_name(data_set.name)
    assert known is not None  # connecting makes it
    asked = ", ".join(f"'{result.run_id}'" for result in results.values())
    found = client.search_runs([known.experiment_id], f"attributes.run_id IN ({asked})")
    infos = {run.info.run_id: run.info for run in found}
    lacking = [name for name, result in results.items() if result.run_id not in infos]
    if lacking:
        raise TrackingError(
            f"{name_store()} does not hold the runs of {', '.join(lacking)}, whose results DVC's cache has: "
            "set MLFLOW_TRACKING_URI to the store that does, or change `seed`, so that they are trained anew"
        )
    seconds = {}
    for name, result in results.items():
        client.set_tag(result.run_id, tag, name)
        client.update_run(result.run_id, name=name)
        info = infos[result.run_id]
        seconds[name] = (info.end_time - info.start_time) / 1000
    run_ids = [result.run_id for result in results.values()]
    return Comparison(known.experiment_id, build_address(known.experiment_id, run_ids), seconds)


def build_address(mlflow_id: str, run_ids: Sequence[str]) -> str:
    """MLflow's page with the runs of an experiment side by side."""
    runs = quote(json.dumps(list(run_ids), separators=(",", ":")))
    return f"{MLFLOW_PAGE}/#/compare-runs?runs={runs}&experiments={quote(json.dumps([mlflow_id]))}"


def locate_weights(weights: str) -> str:
    """A file by its whole path, as an experiment runs in another folder; what is no file as it is."""
    return Path(weights).resolve().as_posix() if weights.endswith(".safetensors") else weights


def write_time(seconds: float) -> str:
    """Minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
