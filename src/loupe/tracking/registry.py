"""Versions of logged models in the registry, and which of them is challenger and champion."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
from filelock import FileLock, Timeout
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from sqlalchemy.engine import make_url

from loupe.errors import TrackingError
from loupe.tracking.audit import create_model
from loupe.tracking.runs import find_root

CHAMPION, CHALLENGER, PREVIOUS_CHAMPION = "champion", "challenger", "previous-champion"
LACKING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # what MLflow says of an alias that nobody has
LOCK_SECONDS = 120


@contextmanager
def lock_registry() -> Iterator[None]:
    """Keep other processes from registering and moving: those with the same SQLite file, else those of this project.

    Raises:
        TrackingError: if another process does not let go of it.
    """
    store = mlflow.get_registry_uri()
    file = make_url(store).database if store.startswith("sqlite:") else None
    path = Path(f"{file}.lock") if file else find_root() / ".mlflow.lock"
    try:
        with FileLock(path, timeout=LOCK_SECONDS):
            yield
    except Timeout as error:
        raise TrackingError(f"another process has held {path} for {LOCK_SECONDS} s: end it, and try again") from error


def register_version(client: MlflowClient, name: str, run_id: str, model_uri: str) -> ModelVersion:
    """Register a run's logged model as the challenger; one that is registered already is found again."""
    with lock_registry():
        create_model(client, name, client.get_run(run_id).info.experiment_id)
        numbers = [known.version for known in client.search_model_versions(f"name='{name}'") if known.run_id == run_id]
        if numbers:
            number = numbers[0]
        else:
            model_id = model_uri.removeprefix("models:/")
            number = client.create_model_version(name, model_uri, run_id, model_id=model_id).version
        client.set_registered_model_alias(name, CHALLENGER, number)
        return client.get_model_version(name, number)


def find_champion(client: MlflowClient, name: str) -> ModelVersion | None:
    """The version that carries the alias, None where none does."""
    try:
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code in LACKING:
            return None
        raise


def find_version(client: MlflowClient, name: str, version: str) -> ModelVersion | None:
    """None where it does not exist, or no longer does."""
    try:
        return client.get_model_version(name, version)
    except MlflowException as error:
        if error.error_code in LACKING:
            return None
        raise
