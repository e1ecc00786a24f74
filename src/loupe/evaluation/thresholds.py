"""Thresholds from normal calibration images alone."""

import math
from fractions import Fraction

import numpy as np
from jaxtyping import Float


def compute_threshold(scores: Float[np.ndarray, " num_images"], false_alarm_rate: float) -> float:
    """The split-conformal threshold: a new normal image scores above it with at most the stated probability.

    It is the ceil((n + 1)(1 - rate))-th smallest of n calibration scores (Vovk, Gammerman and Shafer, "Algorithmic
    Learning in a Random World", 2005). Where n is too small for the rate it is the largest score, and the rate that
    it then stands for is 1 / (n + 1).

    Args:
        scores: anomaly scores of normal images that the model was not trained on.
        false_alarm_rate: in (0, 1).

    Raises:
        ValueError: if there are no scores.
    """
    if scores.size == 0:
        raise ValueError("scores must hold at least one normal calibration image, got none")
    rank = math.ceil((scores.size + 1) * (1 - Fraction(str(false_alarm_rate))))  # 0.7 is not 0.7 in binary
    return float(np.sort(scores)[min(rank, scores.size) - 1])
