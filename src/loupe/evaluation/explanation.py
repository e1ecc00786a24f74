"""Which test images tell most about a classifier: its worst errors, its doubts, and what it takes for what."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int64

Targets = Int64[np.ndarray, " num_images"]
Probabilities = Float[np.ndarray, "num_images num_labels"]
Positions = Int64[np.ndarray, " num_chosen"]


class ConfusedPair(NamedTuple):
    """Two labels, and the positions of the images of each that are taken for the other, the surest error first.

    The first label is the one that is taken for the other more often.
    """

    first: int
    second: int
    first_as_second: Positions
    second_as_first: Positions


def find_most_wrong(targets: Targets, probabilities: Probabilities, number: int) -> Positions:
    """Positions of images that are classified wrongly, the one whose true label got the least probability first."""
    given = probabilities[np.arange(len(targets)), targets]
    order: np.ndarray = np.argsort(given, kind="stable")
    wrong: np.ndarray = order[(probabilities.argmax(axis=1) != targets)[order]]
    return wrong[:number]


def find_most_uncertain(probabilities: Probabilities, number: int) -> Positions:
    """Positions of images whose two likeliest labels are closest, the closest first, whether right or wrong."""
    highest = np.sort(probabilities, axis=1)[:, -2:]
    order: np.ndarray = np.argsort(highest[:, -1] - highest[:, 0], kind="stable")
    return order[:number]


def find_confused_pairs(targets: Targets, probabilities: Probabilities, number: int) -> list[ConfusedPair]:
    """The pairs of labels with most errors between them, in both directions together; the most confused first."""
    predicted = probabilities.argmax(axis=1)
    order = np.argsort(-probabilities.max(axis=1), kind="stable")
    wrong = order[(predicted != targets)[order]]
    pairs = np.sort(np.stack([targets[wrong], predicted[wrong]], axis=1), axis=1)
    distinct, places, counts = np.unique(pairs, axis=0, return_inverse=True, return_counts=True)
    found = []
    for pair in np.argsort(-counts, kind="stable")[:number]:
        of_pair = wrong[places.reshape(-1) == pair]
        is_lower = targets[of_pair] == distinct[pair, 0]
        sides = [(distinct[pair, 0], of_pair[is_lower]), (distinct[pair, 1], of_pair[~is_lower])]
        (first, firsts), (second, seconds) = sorted(sides, key=lambda side: -len(side[1]))
        found.append(ConfusedPair(int(first), int(second), firsts, seconds))
    return found
