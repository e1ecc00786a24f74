"""Whether a model that was exported answers as the one that was trained."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

Anomalies = tuple[Float[np.ndarray, " batch"], Float[np.ndarray, "batch height width"]]  # scores and maps

TOLERANCE = 1e-3  # two runtimes add in different orders: float32 then differs by some 1e-6, and rarely by 1e-4


@dataclass(frozen=True)
class Agreement:
    """How far two arrays of scores are apart.

    `largest_difference` is between two probabilities, in [0, 1], or between two anomaly scores or values of a map, in
    standard deviations: NaN where one is NaN, and 0 where there is none. `num_different_decisions` does not count
    `num_ties`.
    """

    agrees: bool
    largest_difference: float
    num_different_decisions: int
    num_ties: int
    num_images: int
    tolerance: float

    def describe(self) -> str:
        """The figures in words."""
        if not self.num_images:
            return "no image was compared"
        return (
            f"{self.num_different_decisions} of {self.num_images} images are decided otherwise, and scores "
            f"differ by up to {self.largest_difference:.3g} where {self.tolerance:g} is allowed"
        )


def compare_scores(
    expected: Float[np.ndarray, "num_images num_labels"],
    actual: Float[np.ndarray, "num_images num_labels"],
    tolerance: float = TOLERANCE,
) -> Agreement:
    """Compare probabilities of the same images.

    They agree if no two of them differ by more than the tolerance, and no image is decided otherwise. An image for
    which `expected` gives the two decisions probabilities within the tolerance of each other is a tie, and not decided
    otherwise. No images, and any NaN, are no agreement.

    Args:
        expected: what the trained model says, in [0, 1].
        actual: what the exported one says.
        tolerance: the largest difference that is allowed between two probabilities.
    """
    differences = np.abs(expected.astype(np.float64) - actual)
    largest = float(differences.max(initial=0.0))
    ours, theirs = expected.argmax(axis=1), actual.argmax(axis=1)
    rows = np.flatnonzero(ours != theirs)
    num_ties = int((expected[rows, ours[rows]] - expected[rows, theirs[rows]] <= tolerance).sum())
    num_different = len(rows) - num_ties
    return Agreement(
        agrees=len(expected) > 0 and largest <= tolerance and num_different == 0,
        largest_difference=largest,
        num_different_decisions=num_different,
        num_ties=num_ties,
        num_images=len(expected),
        tolerance=tolerance,
    )


def compare_anomalies(
    pairs: Iterable[tuple[Anomalies, Anomalies]], threshold: float, tolerance: float = TOLERANCE
) -> Agreement:
    """Compare raw anomaly scores and maps of the same images, batch by batch, as maps take much room.

    Differences are measured in standard deviations, of the scores and of the maps of the first of each pair. They
    agree if none is above the tolerance, and no image is decided otherwise; one that is within the tolerance of the
    threshold is a tie, and not decided otherwise. No images, and any NaN, are no agreement.

    Args:
        pairs: what the trained detector says, and what the exported one says.
        threshold: an image is flagged where its score is above it.
        tolerance: the largest difference that is allowed, in standard deviations.
    """
    ours, theirs, map_difference, moments = [], [], 0.0, np.zeros(3)
    for (scores, maps), (other_scores, other_maps) in pairs:
        ours.append(scores.astype(np.float64))
        theirs.append(other_scores.astype(np.float64))
        map_difference = np.maximum(map_difference, np.abs(maps.astype(np.float64) - other_maps).max())  # keeps NaN
        moments += maps.size, maps.sum(dtype=np.float64), np.square(maps, dtype=np.float64).sum()
    expected, actual = np.concatenate([np.empty(0), *ours]), np.concatenate([np.empty(0), *theirs])
    _, mean, mean_square = moments / max(moments[0], 1)
    map_std = float(np.sqrt(max(mean_square - mean**2, 0.0)))
    score_std = float(expected.std()) if len(expected) else 0.0
    differences = [_divide(np.abs(expected - actual).max(initial=0.0), score_std), _divide(map_difference, map_std)]
    largest = float(np.max(differences))
    is_other = (expected > threshold) != (actual > threshold)
    is_tie = np.abs(expected - threshold) <= tolerance * score_std
    num_different = int((is_other & ~is_tie).sum())
    return Agreement(
        agrees=len(expected) > 0 and largest <= tolerance and num_different == 0,
        largest_difference=largest,
        num_different_decisions=num_different,
        num_ties=int((is_other & is_tie).sum()),
        num_images=len(expected),
        tolerance=tolerance,
    )


def _divide(difference: float, std: float) -> float:
    """In standard deviations; where there is no deviation, no difference is small."""
    return difference / std if std > 0 else float("inf" if difference > 0 else difference)
