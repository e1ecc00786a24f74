"""MLflow runs: one a training, with parameters, curves, figures, pictures, data and the model itself."""

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import mlflow
import pandas as pd
from filelock import FileLock
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.data.pandas_dataset import from_pandas
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from loupe.errors import TrackingError

SYSTEM_METRICS_SECONDS = 5
MOST_IN_A_BATCH = 1000  # metrics, by MLflow's own limit
ARTIFACT_FOLDERS = {".png": "pictures", ".onnx": "exported", ".data": "exported"}  # by suffix; others are results
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # otherwise the page shows chats and prompts


def connect(experiment: str) -> MlflowClient:
    """Point MLflow at the store of this project, migrate it if nobody has, and choose the experiment.

    The store is what MLFLOW_TRACKING_URI names, otherwise mlflow.db beside params.yaml. Migration is under a lock,
    because two processes that make the tables of one SQLite file at once both fail.
    """
    root = find_root()
    own_store = f"sqlite:///{root / 'mlflow.db'}"
    store = os.environ.get("MLFLOW_TRACKING_URI") or own_store
    mlflow.set_tracking_uri(store)
    with FileLock(root / ".mlflow.lock"):
        client = MlflowClient()
        if client.get_experiment_by_name(experiment) is None:
            artifacts = (root / "mlartifacts").as_uri() if store == own_store else None
            client.create_experiment(experiment, artifacts, tags=EXPERIMENT_TAGS)
    mlflow.set_experiment(experiment)
    return client


def find_root(folder: Path | None = None) -> Path:
    """The project's folder. An experiment of DVC runs in a copy below .dvc/tmp, and still belongs to the project."""
    folder = (folder or Path.cwd()).resolve()
    return Path(*folder.parts[: folder.parts.index(".dvc")]) if ".dvc" in folder.parts else folder


@contextmanager
def start_run(name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> Iterator[str]:
    """Open a run with system metrics; gives its id. A failure inside ends it as FAILED."""
    mlflow.set_system_metrics_sampling_interval(SYSTEM_METRICS_SECONDS)
    with mlflow.start_run(run_name=name, tags={**_describe_code(), **tags}, log_system_metrics=True) as run:
        mlflow.log_params(_flatten(params))
        yield run.info.run_id


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
            f"{run_file} names run {run_id}, which {mlflow.get_tracking_uri()} does not hold: set MLFLOW_TRACKING_URI "
            f"to the store that does, or train again with `dvc repro --force {stage}`"
        ) from error
    return run_id


def log_results(
    client: MlflowClient,
    run_id: str,
    *,
    metrics: Mapping[str, float] | None = None,
    figures: Mapping[str, Figure] | None = None,
    files: Sequence[Path] = (),
) -> None:
    """Add figures, pictures and files to a run, which may have finished."""
    now = int(time.time() * 1000)
    points = [Metric(name, value, now, 0) for name, value in (metrics or {}).items()]
    for start in range(0, len(points), MOST_IN_A_BATCH):
        client.log_batch(run_id, points[start : start + MOST_IN_A_BATCH])
    for name, figure in (figures or {}).items():
        client.log_figure(run_id, figure, f"pictures/{name}.png")
    for path in files:
        client.log_artifact(run_id, str(path), ARTIFACT_FOLDERS.get(path.suffix, "results"))


def _describe_code() -> dict[str, str]:
    """The git commit, whether the tree was clean, and the sha256 of dvc.lock; what there is of them."""
    tags = {}
    git = ["git", "-C", str(Path.cwd())]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if commit.returncode == 0:
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False)
        tags = {"git_commit": commit.stdout.strip(), "git_tree": "changed" if status.stdout else "clean"}
    lock = Path("dvc.lock")
    if lock.exists():
        tags["dvc_lock_sha256"] = hashlib.sha256(lock.read_bytes()).hexdigest()
    return tags


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
