"""Confidence intervals of any figure, from resampling the images that it was computed on."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

NUM_RESAMPLES = 1_000
WEIGHTS_AT_ONCE = 2_000_000  # 16 MB of them, and as much again while they are drawn

Weights = Float[np.ndarray, "num_resamples num_images"]
Statistic = Callable[[Weights], Mapping[str, Float[np.ndarray, " num_resamples"]]]


class Interval(NamedTuple):
    """What a figure might as well have been on other images of the same kind."""

    low: float
    high: float


def compute_intervals(
    statistic: Statistic, num_images: int, seed: int, num_resamples: int = NUM_RESAMPLES, level: float = 0.95
) -> dict[str, Interval]:
    """Percentile intervals of figures: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, section 13.3.

    Images are drawn with replacement, as many as there are, and are taken to be independent of each other; where
    they come in groups, the true interval is wider. Where all resamples agree, as with a model that errs nowhere, the
    interval has no width, and says nothing of errors that are rarer than one in `num_images`.

    Args:
        statistic: the figures of many resamples at once. A resample is how often it has each image, so that a figure
            over images becomes a weighted one; NaN where it is not defined on a resample, which is then left out.
        num_images: at least 1.
        seed: the same gives the same intervals.
        level: how much of the resamples lies within, in (0, 1).

    Returns:
        An interval a figure, NaN at both ends where no resample defines it.

    Raises:
        ValueError: if there are no images.
    """
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    drawn = [statistic(weights) for weights in _draw_weights(num_images, seed, num_resamples)]
    values = {name: np.concatenate([part[name] for part in drawn]) for name in drawn[0]}
    return {name: _compute_interval(one[~np.isnan(one)], level) for name, one in values.items()}


def _draw_weights(num_images: int, seed: int, num_resamples: int) -> Iterator[Weights]:
    """How often each resample has each image; some resamples at a time, so that memory is bounded."""
    generator = np.random.default_rng(seed)
    most = max(1, WEIGHTS_AT_ONCE // num_images)
    for start in range(0, num_resamples, most):
        shape = (min(most, num_resamples - start), num_images)
        cells = generator.integers(num_images, size=shape) + np.arange(shape[0])[:, None] * num_images
        yield np.bincount(cells.reshape(-1), minlength=shape[0] * shape[1]).reshape(shape).astype(np.float64)


def _compute_interval(values: Float[np.ndarray, " num_values"], level: float) -> Interval:
    if values.size == 0:
        return Interval(float("nan"), float("nan"))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
