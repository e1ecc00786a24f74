"""Registered models as they are, without MLflow around them: for scores of many images and what else they can do."""

from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from loupe.errors import TrackingError
from loupe.models.files import load_config
from loupe.tracking.pyfunc import ImageModel
from loupe.tracking.registry import LACKING, find_version


def find_named(client: MlflowClient, name: str) -> ModelVersion | None:
    """The version that `<model>@<alias>` or `<model>/<number>` names, None where there is none."""
    if "@" not in name:
        model, _, number = name.rpartition("/")
        return find_version(client, model, number)
    model, alias = name.split("@", 1)
    try:
        return client.get_model_version_by_alias(model, alias)
    except MlflowException as error:
        if error.error_code in LACKING:
            return None
        raise


def find_folder(version: ModelVersion) -> Path:
    """The folder that the training of a version wrote, fetched from the store where it is not on this machine.

    Raises:
        TrackingError: if the version is no model of ours.
    """
    uri = f"models:/{version.name}/{version.version}"
    folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri))
    found = next((path.parent for path in sorted((folder / "artifacts").glob("*/config.json"))), None)
    if found is None:
        raise TrackingError(
            f"version {version.version} of {version.name} is no model of Loupe's: it has no config.json"
        )
    return found


def load_image_model(version: ModelVersion) -> tuple[ImageModel, dict[str, Any]]:
    """A version ready to answer, and its config."""
    folder, model = find_folder(version), ImageModel()
    model.load(folder)
    return model, load_config(folder)
