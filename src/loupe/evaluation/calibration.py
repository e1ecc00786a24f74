"""Whether a classifier's probabilities can be believed, and what is gained where its unsure answers are left out."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int64
from scipy.optimize import minimize_scalar
from sklearn.metrics import log_loss

NUM_BINS = 15  # as in Guo et al. and most papers since, so that errors can be compared
COLDEST, HOTTEST = 0.1, 10.0  # where nothing is wrong, ever colder is ever better: an end is needed
SMALLEST = 1e-38  # a probability that single precision has rounded to 0 is at most this

Targets = Int64[np.ndarray, " num_images"]
Probabilities = Float[np.ndarray, "num_images num_labels"]


class Reliability(NamedTuple):
    """By bins of confidence (the probability of the predicted class), from 0 to 1, all of one width.

    `confidence` is a bin's mean, `accuracy` the part of its images that is right; NaN where `counts` is 0.
    """

    counts: Int64[np.ndarray, " num_bins"]
    confidence: Float[np.ndarray, " num_bins"]
    accuracy: Float[np.ndarray, " num_bins"]


class Coverage(NamedTuple):
    """The surest images alone: what part of them all, how much of it is right, and the least confidence among them.

    A point for each distinct confidence, the surest first; all values in [0, 1].
    """

    coverage: Float[np.ndarray, " num_points"]
    accuracy: Float[np.ndarray, " num_points"]
    confidence: Float[np.ndarray, " num_points"]


def compute_reliability(targets: Targets, probabilities: Probabilities, num_bins: int = NUM_BINS) -> Reliability:
    """The reliability diagram. A bin holds its upper end and not its lower one, as in Guo et al., arXiv:1706.04599."""
    confidences = probabilities.max(axis=1).astype(np.float64)
    is_right = probabilities.argmax(axis=1) == targets
    bins = np.digitize(confidences, np.linspace(0, 1, num_bins + 1)[1:-1], right=True)
    counts = np.bincount(bins, minlength=num_bins)
    filled = np.where(counts > 0, counts, np.nan)
    return Reliability(
        counts=counts,
        confidence=np.bincount(bins, confidences, num_bins) / filled,
        accuracy=np.bincount(bins, is_right, num_bins) / filled,
    )


def compute_calibration_error(reliability: Reliability) -> float:
    """The expected calibration error in [0, 1], lower is better: equation 3 of Guo et al., arXiv:1706.04599.

    It is the mean over images of the distance between the confidence and the accuracy of their bin; NaN without images.
    """
    counts, confidence, accuracy = reliability
    filled = counts > 0
    if not filled.any():
        return float("nan")
    return float(np.average(np.abs(confidence - accuracy)[filled], weights=counts[filled]))


def fit_temperature(targets: Targets, probabilities: Probabilities) -> float:
    """The temperature with the least log loss, within [0.1, 10]: Guo et al., arXiv:1706.04599, section 4.2.

    Above 1 it makes a classifier less sure, below 1 surer; what it predicts stays as it was. The loss is convex in
    the inverse of the temperature, so that there is one minimum, or an end of the range.

    Args:
        targets: of calibration images, which nothing was trained, chosen or tested on.

    Raises:
        ValueError: if there are no images.
    """
    if targets.size == 0:
        raise ValueError("targets must hold at least one calibration image, got none")
    labels = np.arange(probabilities.shape[1])

    def compute_loss(log_temperature: float) -> float:
        scaled = scale_probabilities(probabilities, float(np.exp(log_temperature)))
        return float(log_loss(targets, scaled, labels=labels))

    found = minimize_scalar(compute_loss, bounds=np.log([COLDEST, HOTTEST]), method="bounded")
    return float(np.exp(found.x))


def scale_probabilities(probabilities: Probabilities, temperature: float) -> Float[np.ndarray, "num_images num_labels"]:
    """What softmax gives of the logits divided by a temperature; logarithms of probabilities do for the logits."""
    logits = np.log(np.maximum(probabilities.astype(np.float64), SMALLEST)) / temperature
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    scaled: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
    return scaled


def compute_coverage(targets: Targets, probabilities: Probabilities) -> Coverage:
    """Accuracy against coverage; images of one confidence are left out or kept together."""
    ends, num_right, confidences = _accumulate(targets, probabilities)
    return Coverage(ends / len(targets), num_right / ends, confidences)


def compute_area_under_risk_coverage(targets: Targets, probabilities: Probabilities) -> float:
    """The area under the risk-coverage curve, in [0, 1], lower is better: Geifman et al., arXiv:1805.08206.

    It is the mean over k of the error rate of the k surest images; NaN without images. Images of one confidence have
    no order; each place among them is worth their mean, which is what all orders give on average.
    """
    if targets.size == 0:
        return float("nan")
    ends, num_right, _ = _accumulate(targets, probabilities)
    places = np.arange(1, len(targets) + 1)
    right = np.interp(places, np.concatenate([[0], ends]), np.concatenate([[0], num_right]))
    return float(np.mean(1 - right / places))


def _accumulate(
    targets: Targets, probabilities: Probabilities
) -> tuple[Int64[np.ndarray, " num_points"], Int64[np.ndarray, " num_points"], Float[np.ndarray, " num_points"]]:
    """How many images have at least a confidence, and how many of them are right; each distinct one, from the top."""
    is_right = probabilities.argmax(axis=1) == targets
    confidences, places, counts = np.unique(
        -probabilities.max(axis=1).astype(np.float64), return_inverse=True, return_counts=True
    )
    right = np.bincount(places, is_right, len(counts)).astype(np.int64)
    return np.cumsum(counts), np.cumsum(right), -confidences


def compute_calibrated_loss(
    targets: Int64[np.ndarray, " num_images"], probabilities: Float[np.ndarray, "num_images num_labels"]
) -> float:
    """The log loss that is left at the best temperature, lower is better; NaN where the network has diverged.

    Epochs differ in how sure they are more than in how much they know: of a network that learns from few images the
    plain loss rises while its accuracy rises too (Guo et al., arXiv:1706.04599, section 3). What is too sure can be put
    right afterwards, as evaluation does with the calibration images.
    """
    if not np.isfinite(probabilities).all():
        return float("nan")
    scaled = scale_probabilities(probabilities, fit_temperature(targets, probabilities))
    return float(log_loss(targets, scaled, labels=np.arange(probabilities.shape[1])))
