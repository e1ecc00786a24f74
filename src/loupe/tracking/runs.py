"""MLflow runs: one a training, with parameters, curves, figures, pictures, data and the model itself."""

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import mlflow
import pandas as pd
import psutil
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.data.pandas_dataset import from_pandas
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from loupe.errors import LoupeError, TrackingError
from loupe.tracking.environment import describe_changes, describe_code, describe_environment, list_packages

SYSTEM_METRICS_SECONDS = 5
MOST_IN_A_BATCH = 1000  # metrics, by MLflow's own limit
LONGEST_FAILURE = 500  # characters
FAILURE_TAG, PROCESS_TAG = "failure", "process"
ENVIRONMENT, PACKAGES, PATCH = "environment/environment.json", "environment/packages.txt", "code/changes.patch"
ARTIFACT_FOLDERS = {".png": "pictures", ".onnx": "exported", ".data": "exported"}  # by suffix; others are results
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # otherwise the page shows chats and prompts


def connect(experiment: str) -> MlflowClient:
    """Point MLflow at the store of this project, and choose the experiment, which is made if nobody has.

    Making it is under the same lock as making the store: two processes that do so at once both fail.
    """
    client, root = open_store(), find_root()
    with FileLock(root / ".mlflow.lock"):
        if client.get_experiment_by_name(experiment) is None:
            artifacts = (root / "mlartifacts").as_uri() if mlflow.get_tracking_uri() == _name_own_store() else None
            client.create_experiment(experiment, artifacts, tags=EXPERIMENT_TAGS)
    mlflow.set_experiment(experiment)
    return client


def open_store() -> MlflowClient:
    """Point MLflow at the store of this project, and migrate it if nobody has.

    It is what MLFLOW_TRACKING_URI names (a relative path from the project's folder), otherwise mlflow.db there.
    Migration is under a lock, because two processes that make the tables of one SQLite file at once both fail.
    """
    mlflow.set_tracking_uri(_anchor(os.environ.get("MLFLOW_TRACKING_URI") or _name_own_store()))
    with FileLock(find_root() / ".mlflow.lock"):
        client = MlflowClient()
        client.search_experiments(max_results=1)
    return client


def _anchor(store: str) -> str:
    """Of a SQLite file under a relative path the whole: experiments and retrainings run in other folders."""
    scheme, separator, path = store.partition(":///")
    is_relative = scheme == "sqlite" and not Path(path).is_absolute()
    return f"{scheme}{separator}{find_root() / path}" if is_relative else store


def name_store() -> str:
    """The store that is used, for a person: without the name and password that its address may hold."""
    return re.sub(r"//[^/@]*@", "//", mlflow.get_tracking_uri())


def _name_own_store() -> str:
    return f"sqlite:///{find_root() / 'mlflow.db'}"


def find_root(folder: Path | None = None) -> Path:
    """The project's folder. An experiment of DVC runs in a copy below .dvc/tmp, and still belongs to the project."""
    folder = (folder or Path.cwd()).resolve()
    return Path(*folder.parts[: folder.parts.index(".dvc")]) if ".dvc" in folder.parts else folder


@contextmanager
def start_run(name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> Iterator[str]:
    """Open a run with system metrics, and with all that it takes to repeat it; gives its id.

    A failure inside ends it as FAILED, an interruption as KILLED, either with its sentence in the tag `failure`.
    """
    mlflow.set_system_metrics_sampling_interval(SYSTEM_METRICS_SECONDS)
    environment = describe_environment()
    own_tags = {**describe_code(), "device": environment["device"], PROCESS_TAG: _name_process(psutil.Process())}
    with (
        mlflow.start_run(run_name=name, tags={**own_tags, **tags}, log_system_metrics=True) as run,
        _interrupted_by_sigterm(),
    ):
        try:
            mlflow.log_params(flatten_params(params))
            mlflow.log_dict(environment, ENVIRONMENT)
            mlflow.log_text(list_packages(), PACKAGES)
            if patch := describe_changes():
                mlflow.log_text(patch, PATCH)
            yield run.info.run_id
        except BaseException as error:
            mlflow.set_tag(FAILURE_TAG, _describe_failure(error))
            mlflow.end_run("FAILED" if isinstance(error, Exception) else "KILLED")
            raise


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM is an interruption too; by itself it would end the process, and the run would seem to go on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _describe_failure(error: BaseException) -> str:
    """One line; errors that are not meant for people have their kind before it."""
    if not isinstance(error, Exception):
        return "it was interrupted"  # Lightning turns an interruption into an exit
    said = " ".join(str(error).split())
    kind = "" if isinstance(error, LoupeError) else f"{type(error).__name__}: "
    return f"{kind}{said}"[:LONGEST_FAILURE]


def _name_process(process: psutil.Process) -> str:
    """Machine, number and start in seconds: numbers are given again."""
    return f"{socket.gethostname()} {process.pid} {process.create_time():.0f}"


def end_dead_runs(client: MlflowClient, experiment_id: str) -> None:
    """End the runs of this machine that seem to go on, but whose process was killed and could not say so."""
    for run in client.search_runs([experiment_id], "attributes.status = 'RUNNING'"):
        name = run.data.tags.get(PROCESS_TAG, "")
        if name.startswith(f"{socket.gethostname()} ") and not _is_alive(name):
            client.set_tag(run.info.run_id, FAILURE_TAG, "its process was killed")
            client.set_terminated(run.info.run_id, "KILLED")


def _is_alive(name: str) -> bool:
    number, start = map(int, name.split()[1:])
    try:
        return bool(abs(psutil.Process(number).create_time() - start) < 2)  # its clock may have been set
    except psutil.NoSuchProcess:
        return False


def log_epoch(epoch: int, metrics: Mapping[str, float]) -> None:
    """One point of each curve of the active run."""
    mlflow.log_metrics(dict(metrics), step=epoch)


def log_dataset(rows: pd.DataFrame, source: Path, name: str, digest: str) -> None:
    """Name the data set of the active run. MLflow's digests have at most 36 characters."""
    dataset = from_pandas(rows, source=str(source.resolve()), name=name, digest=digest[:36])
    mlflow.log_input(dataset, context="training")
    mlflow.set_tag("data_digest", digest)


def find_run(client: MlflowClient, run_file: Path) -> str:
    """The id of the run that made a model, from the file that training wrote beside it.

    Raises:
        TrackingError: if this store does not hold the run.
    """
    run_id: str = json.loads(run_file.read_text())["run_id"]
    try:
        client.get_run(run_id)
    except MlflowException as error:
        stage = f"train_{run_file.parent.name}"
        raise TrackingError(
            f"{run_file} names run {run_id}, which {name_store()} does not hold: set MLFLOW_TRACKING_URI "
            f"to the store that does, or train again with `dvc repro --force {stage}`"
        ) from error
    return run_id


def log_results(
    client: MlflowClient,
    run_id: str,
    *,
    metrics: Mapping[str, float] | None = None,
    files: Sequence[Path] = (),
) -> None:
    """Add metrics and files to a run, which may have finished."""
    now = int(time.time() * 1000)
    points = [Metric(name, value, now, 0) for name, value in (metrics or {}).items()]
    for start in range(0, len(points), MOST_IN_A_BATCH):
        client.log_batch(run_id, points[start : start + MOST_IN_A_BATCH])
    for path in files:
        client.log_artifact(run_id, str(path), ARTIFACT_FOLDERS.get(path.suffix, "results"))


def log_stage_times(client: MlflowClient, run_id: str, task: str, times: Mapping[str, Mapping[str, Any]]) -> None:
    """Add how long the stages took: `stages/<stage>/seconds`, and of the test `<task>/test/seconds`.

    Args:
        task: of the run; stages of the other task are left out.
        times: `seconds` and `unchanged` by stage. What was unchanged took no time that says anything.
    """
    taken = {stage: float(time["seconds"]) for stage, time in times.items() if not time["unchanged"]}
    own = {stage: seconds for stage, seconds in taken.items() if stage.endswith(f"_{task}") or "_" not in stage}
    metrics = {f"stages/{stage}/seconds": seconds for stage, seconds in own.items()}
    if f"evaluate_{task}" in own:
        metrics[f"{task}/test/seconds"] = own[f"evaluate_{task}"]
    log_results(client, run_id, metrics=metrics)


def flatten_params(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values under dotted keys, as a run has them."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten_params(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
