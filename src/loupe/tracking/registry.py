"""Logged models, their versions in the registry, and the aliases `challenger` and `champion`."""

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

import mlflow
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

import loupe
from loupe.models.files import load_config
from loupe.tracking.pyfunc import build_signature

CHAMPION, CHALLENGER = "champion", "challenger"
DECISION_TAG, REASON_TAG, QUESTION_TAG = "promotion", "promotion_reason", "promotion_question"
CHUNK = 512
REQUIREMENTS = (
    "mlflow",
    "numpy",
    "pandas",
    "pillow",
    "safetensors",
    "timm",
    "torch",
    "torchvision",
    "jaxtyping",
    "opencv-python-headless",
    "scipy",
    "pyarrow",
    "scikit-learn",
    "matplotlib",
    "filelock",
)


def log_model(folder: Path, examples: Sequence[Path]) -> str:
    """Log a model's folder to the active run as a pyfunc from code.

    Args:
        folder: what `save_classifier` or `save_autoencoder` wrote, with a `geometry` in its config.
        examples: two or more image files; they become the input example.

    Returns:
        The model's URI.
    """
    package = Path(loupe.__file__).parent
    info = mlflow.pyfunc.log_model(
        name="model",
        python_model=str(package / "tracking" / "served_model.py"),
        artifacts={"model": str(folder)},
        code_paths=[str(package)],
        signature=build_signature(load_config(folder)),
        input_example=pd.DataFrame({"image": [path.read_bytes() for path in examples]}),
        pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in REQUIREMENTS],
    )
    return str(info.model_uri)


def register_version(client: MlflowClient, name: str, run_id: str, model_uri: str) -> ModelVersion:
    """Register a run's logged model as the challenger; one that is registered already is found again."""
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for known in client.search_model_versions(f"name='{name}'"):
        if known.run_id == run_id:
            return client.get_model_version(name, known.version)
    version = client.create_model_version(name, model_uri, run_id, model_id=model_uri.removeprefix("models:/"))
    client.set_registered_model_alias(name, CHALLENGER, version.version)
    return version


def find_champion(client: MlflowClient, name: str) -> ModelVersion | None:
    """The version that carries the alias, None where none does."""
    try:
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def record_decision(
    client: MlflowClient, version: ModelVersion, promoted: bool, reason: str, question: str
) -> ModelVersion:
    """Keep the decision on the version, move the alias if it was promoted, and return the version as it is now.

    Args:
        question: a digest of what the decision rests on.
    """
    for tag, value in (
        (DECISION_TAG, "promoted" if promoted else "kept out"),
        (REASON_TAG, reason),
        (QUESTION_TAG, question),
    ):
        client.set_model_version_tag(version.name, version.version, tag, value)
    if promoted:
        client.set_registered_model_alias(version.name, CHAMPION, version.version)
    return client.get_model_version(version.name, version.version)


def predict_with(version: ModelVersion, images: Sequence[Path]) -> pd.DataFrame:
    """Run a version, as MLflow loads it, over image files; some hundreds are in memory at a time."""
    model = mlflow.pyfunc.load_model(f"models:/{version.name}/{version.version}")
    parts: list[pd.DataFrame] = []
    for start in range(0, len(images), CHUNK):
        contents = [path.read_bytes() for path in images[start : start + CHUNK]]
        parts.append(model.predict(pd.DataFrame({"image": contents})))
    return pd.concat(parts, ignore_index=True)
