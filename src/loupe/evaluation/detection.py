"""What a test says of an anomaly detector, all of it: figures, how sure they are, and whether its threshold held."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int64
from scipy.stats import binomtest

from loupe.evaluation.anomaly import compute_anomaly_metrics, compute_kind_metrics, compute_resampled_metrics
from loupe.evaluation.bootstrap import Interval, compute_intervals
from loupe.evaluation.classification import name_metrics
from loupe.evaluation.localization import Maps, Masks, compute_pixel_interval, compute_pixel_metrics
from loupe.evaluation.thresholds import Threshold

Positions = Int64[np.ndarray, " num_chosen"]


@dataclass(frozen=True)
class Scored:
    """What a detector says of test images: raw scores, a higher one being more anomalous."""

    labels: list[str]
    scores: Float[np.ndarray, " num_images"]
    normal_label: str

    @property
    def is_anomalous(self) -> Bool[np.ndarray, " num_images"]:
        """By label."""
        return np.array([label != self.normal_label for label in self.labels], dtype=bool)


class Pixels(NamedTuple):
    """Anomaly maps beside what is known of each pixel; masks are 1 where anomalous."""

    masks: Masks
    maps: Maps


@dataclass(frozen=True)
class DetectorJudgement:
    """All figures of one test.

    `figures` are those of the whole test, by name; what is not defined is NaN. `kinds` is of `compute_kind_metrics`.
    `chance_of_alarms` is how likely so many false alarms were by what the threshold promised, None without normal
    images. `num_pixel_images` is how many images the figures over pixels are of.
    """

    figures: dict[str, float]
    intervals: dict[str, Interval]
    kinds: pd.DataFrame
    threshold: Threshold
    chance_of_alarms: float | None
    num_images: int
    num_anomalous: int
    num_pixel_images: int

    def to_metrics(self) -> dict[str, float]:
        """Every figure under one flat name, such as `image_auroc`, `image_auroc_low` and `miss_rate/<kind>`.

        What is not defined is left out.
        """
        metrics = dict(self.figures)
        for name, interval in self.intervals.items():
            metrics |= {f"{name}_low": interval.low, f"{name}_high": interval.high}
        named = self.kinds.set_axis(name_metrics(list(self.kinds["kind"]))).drop(columns="kind")
        metrics |= {f"{column}/{kind}": float(value) for column in named for kind, value in named[column].items()}
        metrics |= {"num_images": self.num_images, "num_anomalous": self.num_anomalous}
        return {name: value for name, value in metrics.items() if not math.isnan(value)}


def judge_detector(test: Scored, threshold: Threshold, pixels: Pixels | None, seed: int) -> DetectorJudgement:
    """Compute all figures; the threshold is one of calibration images, and only measured on these.

    Args:
        pixels: of those images whose masks are known, normal ones among them; None where there are no masks.
    """
    is_anomalous, value = test.is_anomalous, threshold.value
    figures = compute_anomaly_metrics(is_anomalous, test.scores, value)
    statistic = partial(compute_resampled_metrics, is_anomalous, test.scores)
    intervals = compute_intervals(statistic, len(test.scores), seed)
    alarms, misses = test.scores[~is_anomalous] > value, test.scores[is_anomalous] <= value
    intervals |= {"false_alarm_rate": _compute_rate_interval(alarms), "miss_rate": _compute_rate_interval(misses)}
    if pixels is not None:
        figures |= compute_pixel_metrics(pixels.masks, pixels.maps)
        intervals["pixel_auroc"] = compute_pixel_interval(pixels.masks, pixels.maps, seed)
    return DetectorJudgement(
        figures=figures,
        intervals=intervals,
        kinds=compute_kind_metrics(test.labels, test.scores, value, test.normal_label),
        threshold=threshold,
        chance_of_alarms=threshold.compute_chance(int(alarms.sum()), len(alarms)) if len(alarms) else None,
        num_images=len(test.scores),
        num_anomalous=int(is_anomalous.sum()),
        num_pixel_images=0 if pixels is None else len(pixels.maps),
    )


def _compute_rate_interval(errs: Bool[np.ndarray, " num_images"]) -> Interval:
    """Exact at 95% (Clopper and Pearson, 1934), so that it has a width where no image errs; NaN without images."""
    if not errs.size:
        return Interval(math.nan, math.nan)
    found = binomtest(int(errs.sum()), errs.size).proportion_ci()
    return Interval(float(found.low), float(found.high))


def find_worst_misses(test: Scored, number: int) -> Positions:
    """Positions of the anomalous images with the lowest scores, the lowest first, whether they are flagged or not."""
    order: np.ndarray = np.argsort(test.scores, kind="stable")
    misses: np.ndarray = order[test.is_anomalous[order]]
    return misses[:number]


def find_worst_false_alarms(test: Scored, number: int) -> Positions:
    """Positions of the normal images with the highest scores, the highest first, whether they are flagged or not."""
    order: np.ndarray = np.argsort(-test.scores, kind="stable")
    alarms: np.ndarray = order[~test.is_anomalous[order]]
    return alarms[:number]


def choose_fixed_sample(image_ids: Sequence[str], labels: Sequence[str], number: int) -> Positions:
    """Positions of images that are the same in every run, whatever a detector says of them.

    The labels take turns, in their order by name; of each, images come in the order of their ids, which are hashes of
    their contents and so as good as drawn by lot.
    """
    table = pd.DataFrame({"label": list(labels), "image_id": list(image_ids)}).sort_values("image_id", kind="stable")
    table["turn"] = table.groupby("label").cumcount()
    chosen = table.sort_values(["turn", "label"], kind="stable").index[:number]
    return chosen.to_numpy(dtype=np.int64)
