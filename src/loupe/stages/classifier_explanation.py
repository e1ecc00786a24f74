"""The pictures that explain a classifier: its errors and doubts with heat maps, what it confuses, and its filters."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from loupe.data.prepare import Prepared
from loupe.evaluation.explanation import find_confused_pairs, find_most_uncertain, find_most_wrong
from loupe.evaluation.judgement import Answers
from loupe.evaluation.pictures import overlay_heat
from loupe.models.attribution import compute_filters, compute_grad_cam, compute_responses
from loupe.models.classifiers import Classifier

NUM_PAIRS, NUM_PAIR_EXAMPLES = 6, 3
NUM_FILTERS = 64

Pixels = UInt8[np.ndarray, "height width channels"]


class Example(NamedTuple):
    """One test image, as much of it as the network sees.

    `likeliest` are labels and their probabilities, the likeliest first; the true label is always among them.
    `heat` is the image under the map that speaks for `predicted`, None where the network has no such map.
    """

    path: str
    label: str
    predicted: str
    likeliest: list[tuple[str, float]]
    image: Pixels
    heat: Pixels | None


class Confusion(NamedTuple):
    """Images of one label that are taken for another: how many, and the first of them."""

    label: str
    predicted: str
    number: int
    examples: list[Example]


class Explanation(NamedTuple):
    """`pairs` hold one or two directions each, that with more errors first.

    `map_size` is (height, width) of the heat maps, None where the network has none. `filters` and `responses` (to
    `sample`) are None for a network without a convolution; `num_filters` says how many it has.
    """

    most_wrong: list[Example]
    most_uncertain: list[Example]
    pairs: list[list[Confusion]]
    map_size: tuple[int, int] | None
    num_filters: int
    filters: UInt8[np.ndarray, "num_shown height width channels"] | None
    responses: UInt8[np.ndarray, "num_shown height width channels"] | None
    sample: Example


def explain_classifier(
    classifier: Classifier, prepared: Prepared, rows: np.ndarray, test: Answers, num_pictures: int
) -> Explanation:
    """Choose the test images that tell most, and draw where the network looks.

    Args:
        rows: where the images of `test` stand among the prepared ones.
        num_pictures: how many errors and how many doubts at most.
    """
    wrong = find_most_wrong(test.targets, test.probabilities, num_pictures)
    uncertain = find_most_uncertain(test.probabilities, num_pictures)
    chosen = np.concatenate([wrong, uncertain])
    maps = compute_grad_cam(classifier, _read_images(prepared, rows[chosen]), test.predicted[chosen])
    examples = _Examples(classifier, prepared, rows, test)
    filters, sample = compute_filters(classifier), _choose_sample(test)
    responses = compute_responses(classifier, _read_images(prepared, rows[[sample]])[0])
    shown = [examples.build(row, None if maps is None else maps[place]) for place, row in enumerate(chosen)]
    return Explanation(
        most_wrong=shown[: len(wrong)],
        most_uncertain=shown[len(wrong) :],
        pairs=_list_pairs(examples, test),
        map_size=None if maps is None else (maps.shape[1], maps.shape[2]),
        num_filters=0 if filters is None else len(filters),
        filters=None if filters is None else filters[:NUM_FILTERS],
        responses=None if responses is None else responses[:NUM_FILTERS],
        sample=examples.build(sample),
    )


class _Examples:
    """Makes examples of test images by their positions."""

    def __init__(self, classifier: Classifier, prepared: Prepared, rows: np.ndarray, test: Answers) -> None:
        self.config = classifier.config
        self.prepared, self.rows, self.test = prepared, rows, test

    def build(self, position: int, heat: Float[np.ndarray, "map_height map_width"] | None = None) -> Example:
        labels, row = self.config.labels, self.rows[position]
        target, probabilities = self.test.targets[position], self.test.probabilities[position]
        named = np.argsort(-probabilities, kind="stable")[:2].tolist()
        named += [] if target in named else [int(target)]
        image = _crop(self.prepared.images[row], self.config.crop)
        return Example(
            path=str(self.prepared.index["path"].iloc[row]),
            label=labels[target],
            predicted=labels[named[0]],
            likeliest=[(labels[one], float(probabilities[one])) for one in named],
            image=image,
            heat=None if heat is None else overlay_heat(image, heat),
        )


def _list_pairs(examples: _Examples, test: Answers) -> list[list[Confusion]]:
    labels, pairs = examples.config.labels, []
    for pair in find_confused_pairs(test.targets, test.probabilities, NUM_PAIRS):
        sides = [(pair.first, pair.second, pair.first_as_second), (pair.second, pair.first, pair.second_as_first)]
        pairs.append(
            [
                Confusion(
                    labels[true],
                    labels[predicted],
                    len(positions),
                    [examples.build(position) for position in positions[:NUM_PAIR_EXAMPLES]],
                )
                for true, predicted, positions in sides
                if len(positions)
            ]
        )
    return pairs


def _choose_sample(test: Answers) -> int:
    """The image that is classified with most confidence, a right one if there is any."""
    confidence = test.probabilities.max(axis=1)
    return int(np.lexsort((-confidence, test.predicted != test.targets))[0])


def _read_images(
    prepared: Prepared, rows: Int64[np.ndarray, " num_images"]
) -> UInt8[Tensor, "num_images channels height width"]:
    return torch.from_numpy(np.asarray(prepared.images[rows])).permute(0, 3, 1, 2)


def _crop(image: Pixels, crop: tuple[int, int]) -> Pixels:
    """The central part that `Preprocess` takes."""
    top, left = ((image.shape[axis] - crop[axis]) // 2 for axis in (0, 1))
    return np.asarray(image[top : top + crop[0], left : left + crop[1]])
