"""Models as MLflow keeps them: a folder that training wrote becomes a pyfunc from code, and answers as one."""

import importlib.metadata
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pandas as pd
from mlflow.entities.model_registry import ModelVersion
from mlflow.pyfunc import PyFuncModel

import loupe
from loupe.models.files import load_config
from loupe.tracking.pyfunc import build_signature

CHUNK = 512
NUM_TIMED, NUM_TIMES = 16, 5  # images in a batch, and how often each model has it
REQUIREMENTS = (
    "mlflow",
    "numpy",
    "pandas",
    "pillow",
    "safetensors",
    "timm",
    "torch",
    "torchmetrics",
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
        folder: what `save_classifier` or `save_detector` wrote, with a `geometry` in its config.
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


@dataclass(frozen=True)
class LoadedModel:
    """A logged model as MLflow loads it, and a folder that holds the one that its training wrote."""

    pyfunc: PyFuncModel
    folder: Path

    @property
    def num_bytes(self) -> int:
        """Of all files in the folder."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def predict(self, images: Sequence[Path]) -> pd.DataFrame:
        """One row an image file, as `ImageModel` gives them; some hundreds are in memory at a time."""
        parts: list[pd.DataFrame] = []
        for start in range(0, len(images), CHUNK):
            contents = [path.read_bytes() for path in images[start : start + CHUNK]]
            parts.append(pd.DataFrame(self.pyfunc.predict(pd.DataFrame({"image": contents}))))
        return pd.concat(parts, ignore_index=True)


def load_model(model_uri: str) -> LoadedModel:
    """Load a logged model, `models:/<id>`, or a registered one, `models:/<name>/<version>`."""
    folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=model_uri))
    return LoadedModel(mlflow.pyfunc.load_model(str(folder)), folder / "artifacts")


def predict_with(version: ModelVersion, images: Sequence[Path]) -> pd.DataFrame:
    """Run a version, as MLflow loads it, over image files."""
    return load_model(f"models:/{version.name}/{version.version}").predict(images)


def measure_latencies(models: Sequence[LoadedModel], images: Sequence[Path]) -> list[float]:
    """Milliseconds an image of each model, decoding and all: medians over batches of the same images.

    The models take turns, so that what else the machine does slows them alike; a first batch of each does not count.
    """
    images = images[:NUM_TIMED]
    seconds: list[list[float]] = [[] for _ in models]
    for _ in range(NUM_TIMES + 1):
        for model, taken in zip(models, seconds, strict=True):
            start = time.perf_counter()
            model.predict(images)
            taken.append(time.perf_counter() - start)
    return [1000 * statistics.median(taken[1:]) / len(images) for taken in seconds]
