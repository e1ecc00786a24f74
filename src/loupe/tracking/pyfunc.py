"""Our models as MLflow serves them: image files in, one row an image out."""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from jaxtyping import UInt8
from mlflow.models import ModelSignature
from mlflow.pyfunc import PythonModel, PythonModelContext
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from torch import Tensor

from loupe.data.images import Geometry, choose_num_threads, read_image
from loupe.errors import ConfigError, DataError
from loupe.evaluation.thresholds import check_false_alarm_rate, compute_threshold
from loupe.models.classifiers import load_classifier
from loupe.models.detectors.family import load_detector
from loupe.models.files import load_config

CALIBRATION = "calibration_scores.parquet"  # beside a detector's weights: raw scores of normal images


@dataclass(frozen=True)
class Options:
    """What is asked beside the plain answer.

    `threshold` is a raw anomaly score, and `false_alarm_rate` in (0, 1) sets one by the calibration images; with
    neither it is the detector's own. `embeddings` and `maps` add the columns of that name in the singular.
    """

    threshold: float | None = None
    false_alarm_rate: float | None = None
    embeddings: bool = False
    maps: bool = False

    def __post_init__(self) -> None:
        """Raises ConfigError where they contradict each other, or nothing could be above the threshold."""
        if self.threshold is not None and self.false_alarm_rate is not None:
            raise ConfigError("a threshold and a false-alarm rate are two ways to set the same: give one of them")
        if self.threshold is not None and math.isnan(self.threshold):
            raise ConfigError("a threshold must be a number, and nan is none: nothing is above it")


class Predictor(Protocol):
    """What a model says of a batch of prepared images: columns, a value an image."""

    def __call__(
        self, images: UInt8[Tensor, "batch channels height width"], options: Options
    ) -> Mapping[str, Sequence[Any]]: ...


class ImageModel(PythonModel):
    """A classifier or a detector, from the folder that its training wrote.

    Input: a column `image` with the bytes of image files, of any size and any number.
    Output of a classifier: `predicted` and `probability_<label>`; of a detector: `anomaly_score`, `is_anomalous` and
    `threshold`. `problem` says why a file can't be read as an image; it is null where it can, and the rest where not.
    Params are those of `Options`: an `embedding` is a list of numbers, an `anomaly_map` one of rows.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Load weights and config, onto the GPU where there is one."""
        self.load(Path(context.artifacts["model"]))

    def load(self, folder: Path) -> None:
        """The same from the folder itself."""
        config = load_config(folder)
        self.geometry = Geometry(**config["geometry"])
        self.predict_batch = (_load_classifier if "classifier" in config else _load_detector)(folder, config)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """One row an image, in the order of the input."""
        answers = self.answer(list(model_input["image"]), Options(**params or {}))
        for column in {"embedding", "anomaly_map"} & set(answers):
            answers[column] = [
                values.tolist() if isinstance(values, np.ndarray) else None for values in answers[column]
            ]
        for column in answers.columns[answers.isna().any()]:  # what lacks a value is null in JSON, which has no NaN
            answers[column] = answers[column].astype("object").where(answers[column].notna(), None)
        return answers

    def answer(self, contents: Sequence[object], options: Options) -> pd.DataFrame:
        """The same, with embeddings and maps as arrays of float32."""
        size = self.geometry.batch_size
        parts = [
            self._answer_batch(contents[start : start + size], options) for start in range(0, len(contents) or 1, size)
        ]
        return pd.concat(parts, ignore_index=True)

    def _answer_batch(self, contents: Sequence[object], options: Options) -> pd.DataFrame:
        num_threads = choose_num_threads([len(content) for content in contents if isinstance(content, bytes)])
        with ThreadPoolExecutor(num_threads) as pool:  # decoding lets other threads run
            results = list(pool.map(self._read, contents))
        images = [result for result in results if isinstance(result, np.ndarray)]
        problems = [result if isinstance(result, str) else None for result in results]
        blank = np.zeros((self.geometry.height, self.geometry.width, self.geometry.channels), np.uint8)
        batch = torch.from_numpy(np.stack(images or [blank])).permute(0, 3, 1, 2)  # not all networks take no image
        readable = [row for row, problem in enumerate(problems) if problem is None]
        answers = {
            name: pd.Series(values[: len(readable)], readable)
            for name, values in self.predict_batch(batch, options).items()
        }
        return pd.DataFrame({**answers, "problem": pd.Series(problems, dtype="str")}, index=range(len(contents)))

    def _read(self, content: object) -> np.ndarray | str:
        """The prepared image, or why there is none. Text is never taken for the path of a file."""
        if not isinstance(content, bytes):
            return "the image is no bytes: expected those of an image file, in JSON in base64"
        try:
            return read_image(content, self.geometry)
        except DataError as error:
            return str(error)


def _load_classifier(folder: Path, config: dict[str, Any]) -> Predictor:
    classifier = load_classifier(folder).to(_choose_device())
    labels = np.array(classifier.config.labels)

    @torch.inference_mode()
    def classify(images: Tensor, options: Options) -> dict[str, Sequence[Any]]:
        features, logits = classifier.compute_both(images.to(_choose_device()))
        probabilities = logits.float().softmax(dim=1).cpu().numpy()
        answers = {"predicted": labels[probabilities.argmax(axis=1)]}
        answers |= {f"probability_{label}": probabilities[:, i] for i, label in enumerate(labels)}
        return answers | ({"embedding": list(features.float().cpu().numpy())} if options.embeddings else {})

    return classify


def _load_detector(folder: Path, config: dict[str, Any]) -> Predictor:
    detector = load_detector(folder).to(_choose_device())

    @torch.inference_mode()
    def find_anomalies(images: Tensor, options: Options) -> dict[str, Sequence[Any]]:
        images = images.to(_choose_device())
        raw, maps = detector(images)
        scores = raw.cpu().numpy().astype(np.float64)
        threshold = choose_threshold(folder, config, options)
        answers: dict[str, Any] = {
            "anomaly_score": scores,
            "is_anomalous": pd.array(scores > threshold, "boolean"),
            "threshold": np.full(len(scores), threshold),
        }
        answers |= {"embedding": list(detector.embed(images).float().cpu().numpy())} if options.embeddings else {}
        return answers | ({"anomaly_map": list(maps.float().cpu().numpy())} if options.maps else {})

    return find_anomalies


def choose_threshold(folder: Path, config: dict[str, Any], options: Options) -> float:
    """The detector's own threshold, or the one that is asked for.

    Raises:
        ConfigError: if the calibration images are too few for the rate that is asked for.
    """
    if options.threshold is not None:
        return options.threshold
    if options.false_alarm_rate is None:
        return float(config["threshold"])
    scores = pd.read_parquet(folder / CALIBRATION)["anomaly_score"].to_numpy()
    check_false_alarm_rate(options.false_alarm_rate, len(scores))
    return compute_threshold(scores, options.false_alarm_rate)


def _choose_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def build_signature(config: dict[str, Any]) -> ModelSignature:
    """Names and types of what goes in and comes out."""
    params = [ParamSpec("embeddings", DataType.boolean, False)]
    if "classifier" in config:
        outputs = [ColSpec(DataType.string, "predicted", required=False)]
        labels = config["classifier"]["labels"]
        outputs += [ColSpec(DataType.float, f"probability_{label}", required=False) for label in labels]
    else:
        outputs = [
            ColSpec(DataType.double, "anomaly_score", required=False),
            ColSpec(DataType.boolean, "is_anomalous", required=False),
            ColSpec(DataType.double, "threshold", required=False),
        ]
        params += [
            ParamSpec("maps", DataType.boolean, False),
            ParamSpec("threshold", DataType.double, None),
            ParamSpec("false_alarm_rate", DataType.double, None),
        ]
    outputs.append(ColSpec(DataType.string, "problem", required=False))
    inputs = Schema([ColSpec(DataType.binary, "image")])
    return ModelSignature(inputs=inputs, outputs=Schema([*outputs]), params=ParamSchema(params))
