"""Our models as MLflow serves them: image files in, one row an image out."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from mlflow.models import ModelSignature
from mlflow.pyfunc import PythonModel, PythonModelContext
from mlflow.types import ColSpec, DataType, Schema, TensorSpec

from loupe.data.images import Geometry, fit_image, open_image
from loupe.models.classifiers import load_classifier, predict_probabilities
from loupe.models.detectors.base import detect
from loupe.models.detectors.family import load_detector
from loupe.models.files import load_config

BATCH_SIZE = 64


class _Predictor(Protocol):
    def __call__(self, images: torch.Tensor) -> pd.DataFrame: ...


class ImageModel(PythonModel):
    """A classifier or a detector, from the folder that its training wrote.

    Input: a column `image` with the bytes of image files, of any size and any number.
    Output of a classifier: `predicted` and `probability_<label>`; of a detector: `anomaly_score`, `is_anomalous` and
    `threshold`.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Load weights and config, onto the GPU where there is one."""
        folder = Path(context.artifacts["model"])
        config = load_config(folder)
        self.geometry = Geometry(**config["geometry"])
        self.predict_batch = _load_predictor(folder, config)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """One row an image, in the order of the input."""
        contents = list(model_input["image"])
        parts = [
            self._predict_contents(contents[start : start + BATCH_SIZE])
            for start in range(0, len(contents), BATCH_SIZE)
        ]
        return pd.concat(parts, ignore_index=True)

    def _predict_contents(self, contents: list[bytes]) -> pd.DataFrame:
        images = np.stack([fit_image(open_image(content), self.geometry) for content in contents])
        return self.predict_batch(torch.from_numpy(images).permute(0, 3, 1, 2))


def _load_predictor(folder: Path, config: dict[str, Any]) -> _Predictor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if "classifier" in config:
        classifier = load_classifier(folder).to(device)
        labels = np.array(classifier.config.labels)

        def classify(images: torch.Tensor) -> pd.DataFrame:
            probabilities = predict_probabilities(classifier, images).numpy()
            columns = {f"probability_{label}": probabilities[:, i] for i, label in enumerate(labels)}
            return pd.DataFrame({"predicted": labels[probabilities.argmax(axis=1)], **columns})

        return classify
    detector = load_detector(folder).to(device)
    threshold = float(config["threshold"])

    def find_anomalies(images: torch.Tensor) -> pd.DataFrame:
        scores = detect(detector, images)[0].numpy().astype(np.float64)
        return pd.DataFrame({"anomaly_score": scores, "is_anomalous": scores > threshold, "threshold": threshold})

    return find_anomalies


def build_signature(config: dict[str, Any]) -> ModelSignature:
    """Names and types of what goes in and comes out."""
    inputs = Schema([ColSpec(DataType.binary, "image")])
    if "classifier" in config:
        outputs: list[ColSpec | TensorSpec] = [ColSpec(DataType.string, "predicted")]
        outputs += [ColSpec(DataType.float, f"probability_{label}") for label in config["classifier"]["labels"]]
    else:
        outputs = [
            ColSpec(DataType.double, "anomaly_score"),
            ColSpec(DataType.boolean, "is_anomalous"),
            ColSpec(DataType.double, "threshold"),
        ]
    return ModelSignature(inputs=inputs, outputs=Schema(outputs))
