"""What a test says of a classifier, all of it: figures, how sure they are, and how sure the classifier may be."""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
from jaxtyping import Float, Int64

from loupe.evaluation.bootstrap import Interval, compute_intervals
from loupe.evaluation.calibration import (
    Coverage,
    Reliability,
    compute_area_under_risk_coverage,
    compute_calibration_error,
    compute_coverage,
    compute_reliability,
    fit_temperature,
    scale_probabilities,
)
from loupe.evaluation.classification import (
    compute_class_metrics,
    compute_classification_metrics,
    compute_confusion,
    compute_resampled_metrics,
    compute_top_3_accuracy,
    name_metrics,
)


@dataclass(frozen=True)
class Answers:
    """What a classifier says of the images of one split: `targets` are positions of true labels."""

    targets: Int64[np.ndarray, " num_images"]
    probabilities: Float[np.ndarray, "num_images num_labels"]

    @property
    def predicted(self) -> Int64[np.ndarray, " num_images"]:
        """Positions of the likeliest labels; the first of those that are equally likely."""
        predicted: np.ndarray = self.probabilities.argmax(axis=1)
        return predicted


@dataclass(frozen=True)
class Judgement:
    """All figures of one test.

    `figures` are those of the whole test, by name; what is not defined is NaN. `classes` is of
    `compute_class_metrics`. `temperature` and `scaled` are None without calibration images.
    """

    figures: dict[str, float]
    intervals: dict[str, Interval]
    classes: pd.DataFrame
    confusion: Int64[np.ndarray, "num_labels num_labels"]
    reliability: Reliability
    scaled: Reliability | None
    temperature: float | None
    coverage: Coverage
    num_calibration: int

    def to_metrics(self, labels: list[str]) -> dict[str, float]:
        """Every figure under one flat name, such as `accuracy`, `accuracy_low` and `recall/<label>`.

        What is not defined is left out.
        """
        metrics = dict(self.figures)
        for name, interval in self.intervals.items():
            metrics |= {f"{name}_low": interval.low, f"{name}_high": interval.high}
        named = self.classes.set_axis(name_metrics(labels))
        metrics |= {f"{column}/{label}": float(value) for column in named for label, value in named[column].items()}
        return {name: value for name, value in metrics.items() if not math.isnan(value)}


def judge_classifier(test: Answers, calibration: Answers, seed: int) -> Judgement:
    """Compute all figures. The temperature is fitted on calibration images, and only measured on test images."""
    reliability = compute_reliability(test.targets, test.probabilities)
    figures = compute_classification_metrics(test.targets, test.probabilities) | {
        "top_3_accuracy": compute_top_3_accuracy(test.targets, test.probabilities),
        "calibration_error": compute_calibration_error(reliability),
        "area_under_risk_coverage": compute_area_under_risk_coverage(test.targets, test.probabilities),
    }
    temperature, scaled = None, None
    if len(calibration.targets):
        temperature = fit_temperature(calibration.targets, calibration.probabilities)
        probabilities = scale_probabilities(test.probabilities, temperature)
        scaled = compute_reliability(test.targets, probabilities)
        figures |= {
            "temperature": temperature,
            "calibration_error_scaled": compute_calibration_error(scaled),
            "log_loss_scaled": compute_classification_metrics(test.targets, probabilities)["log_loss"],
        }
    statistic = partial(compute_resampled_metrics, test.targets, test.probabilities)
    num_labels = test.probabilities.shape[1]
    return Judgement(
        figures=figures,
        intervals=compute_intervals(statistic, len(test.targets), seed),
        classes=compute_class_metrics(test.targets, test.predicted, num_labels),
        confusion=compute_confusion(test.targets, test.predicted, num_labels),
        reliability=reliability,
        scaled=scaled,
        temperature=temperature,
        coverage=compute_coverage(test.targets, test.probabilities),
        num_calibration=len(calibration.targets),
    )
