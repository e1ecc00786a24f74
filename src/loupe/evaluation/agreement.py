"""Whether a model that was exported answers as the one that was trained."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

TOLERANCE = 1e-3  # two runtimes add in different orders: float32 then differs by some 1e-6, and rarely by 1e-4


@dataclass(frozen=True)
class Agreement:
    """How far two arrays of probabilities are apart.

    `largest_difference` is between two probabilities, in [0, 1]: NaN where one is NaN, and 0 where there is none.
    `num_different_decisions` does not count `num_ties`.
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
            f"{self.num_different_decisions} of {self.num_images} images are decided otherwise, and probabilities "
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
