"""Whether recent images are like those of a reference: permutation tests, and effects that a person understands.

If both kinds of image come from one distribution, which of them are called recent is chance. So each statistic is set
against the same one after the names were dealt anew: no assumption is needed but that images are independent of each
other, and all that is made of the images beforehand (bandwidth, ranks) is made of both kinds together.

Images of one part, or of one moment, are not independent: any two parts differ, and the more photos there are of each,
the surer a test would be that something changed. Such images are a group, and groups are dealt whole.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int64
from scipy.stats import norm
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics import pairwise_distances
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.preprocessing import KernelCenterer

from loupe.config import Drift
from loupe.evaluation.anomaly import compute_image_auroc, compute_resampled_metrics
from loupe.evaluation.bootstrap import Interval, compute_intervals

EMBEDDING, SCORE = "embedding", "score"
RIDGE = 1.0  # scikit-learn's own; a plain MMD, which has none, finds weak blur and other light half as often
NUM_FOLDS = 5
TIE = 1e-9  # statistics, which have no unit, that differ less differ by rounding
WITNESS_DIGITS = 9  # after the point; beyond them equal images differ by rounding
POWER = 0.8
# Cohen's "small", "medium" and "large" as AUROC: Ruscio, "A probability-based measure of effect size", 2008.
STRENGTHS = ((0.714, "strongly"), (0.638, "moderately"), (0.556, "slightly"), (0.0, "hardly"))

Embeddings = Float[np.ndarray, "num_images num_values"]
Scores = Float[np.ndarray, " num_images"]
Kinds = Bool[np.ndarray, " num_images"]
Deals = Bool[np.ndarray, "num_deals num_images"]
Square = Float[np.ndarray, "num_images num_images"]
Folds = Sequence[Int64[np.ndarray, " _fold_images"]]
Groups = Int64[np.ndarray, " num_images"]


@dataclass(frozen=True)
class Sample:
    """Images of one kind; raw `scores` of a detector, higher is more anomalous, None where there is none.

    `groups` count from 0 without gaps; None where each image is one of its own.
    """

    embeddings: Embeddings
    scores: Scores | None = None
    groups: Groups | None = None

    @property
    def num_groups(self) -> int:
        """How many are independent of each other."""
        return len(self.embeddings) if self.groups is None else len(np.unique(self.groups))


@dataclass(frozen=True)
class Comparison:
    """One test. `effect` is an AUROC, 0.5 where there is no difference, with its 95% interval.

    Of scores it is the chance that a recent image scores above a reference one. Of embeddings it is the chance that a
    recent image looks more recent than a reference one to a witness that has seen neither.
    """

    p_value: float
    effect: float
    interval: Interval
    is_drifted: bool

    @property
    def strength(self) -> str:
        """The effect in a word, whichever its direction."""
        return next(word for least, word in STRENGTHS if max(self.effect, 1 - self.effect) >= least)


@dataclass(frozen=True)
class DriftJudgement:
    """What came of both tests; `comparisons` by EMBEDDING and SCORE are empty where there are too few images to say.

    `witness` says of each image, the reference ones first, how recent it looks: higher is more recent, and the
    function was fitted without that image. `nearest` has the position of the nearest reference image of each recent
    one.
    """

    num_reference: int
    num_recent: int
    num_reference_groups: int
    num_recent_groups: int
    comparisons: Mapping[str, Comparison] = field(default_factory=dict)
    witness: Scores = field(default_factory=lambda: np.empty(0))
    nearest: Int64[np.ndarray, " num_recent"] = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def is_decided(self) -> bool:
        """Whether there were enough images to test."""
        return bool(self.comparisons)

    @property
    def is_drifted(self) -> bool:
        """Whether any test found a drift."""
        return any(one.is_drifted for one in self.comparisons.values())

    def find_moved_most(self, number: int) -> list[int]:
        """Positions of the recent images that look most recent, the most first."""
        recent = self.witness[self.num_reference :]
        return [int(position) for position in np.argsort(-recent, kind="stable")[:number]]

    def compute_strangeness(self) -> Float[np.ndarray, " num_recent"]:
        """The part of the reference images that look less recent than each recent one, in [0, 1]."""
        reference = np.sort(self.witness[: self.num_reference])
        places = np.searchsorted(reference, self.witness[self.num_reference :])
        return np.asarray(places / max(1, self.num_reference), np.float64)


def judge_drift(reference: Sample, recent: Sample, rules: Drift, seed: int) -> DriftJudgement:
    """Test embeddings, and scores where both have them, at the rate of false alarms of both tests together.

    Embeddings are taken as they are: on real images standardising each value found no more.

    Args:
        seed: of permutations, folds and intervals.
    """
    counts = (len(reference.embeddings), len(recent.embeddings), reference.num_groups, recent.num_groups)
    if min(counts) < rules.min_images:
        return DriftJudgement(*counts)
    is_recent, groups = np.arange(counts[0] + counts[1]) >= counts[0], _join_groups(reference, recent)
    deals = deal(is_recent, groups, rules.num_permutations, seed)
    distances = pairwise_distances(np.concatenate([reference.embeddings, recent.embeddings]).astype(np.float64))
    kernel = build_kernel(distances)
    folds = divide_into_folds(is_recent, groups, seed)
    witness = compute_witness(kernel, is_recent, folds)
    p_values = {EMBEDDING: compute_p_value(compute_separation(kernel, deals, groups))}
    effects = {EMBEDDING: compute_effect(is_recent, witness, groups, folds, seed)}
    if reference.scores is not None and recent.scores is not None:
        scores = np.concatenate([reference.scores, recent.scores])
        p_values[SCORE] = compute_p_value(compute_anderson_darling(scores, deals))
        effects[SCORE] = compute_effect(is_recent, scores, groups, [np.arange(len(scores))], seed)
    found = reject(p_values, rules.false_alarm_rate)
    comparisons = {name: Comparison(p_values[name], *effects[name], name in found) for name in p_values}
    nearest = distances[counts[0] :, : counts[0]].argmin(axis=1)
    return DriftJudgement(*counts, comparisons, witness, nearest)


def _join_groups(reference: Sample, recent: Sample) -> Groups:
    """Those of both kinds, the reference first."""
    parts = [np.arange(len(one.embeddings)) if one.groups is None else one.groups for one in (reference, recent)]
    return np.concatenate([parts[0], parts[1] + reference.num_groups])


def deal(is_recent: Kinds, groups: Groups, num_permutations: int, seed: int) -> Deals:
    """The names as they are in the first row, and then dealt anew; all images of a group have one name."""
    dealt = np.zeros((num_permutations + 1, int(groups.max()) + 1), bool)
    dealt[:, groups[is_recent]] = True
    np.random.default_rng(seed).permuted(dealt[1:], axis=1, out=dealt[1:])
    return dealt[:, groups]


def compute_p_value(statistics: Float[np.ndarray, " num_deals"]) -> float:
    """The part of all deals, the real one first, whose statistic is at least that of the real one.

    With the real one among them the p-value keeps its promise for any number of permutations: Phipson and Smyth,
    "Permutation p-values should never be zero", 2010.
    """
    slack = TIE * max(1.0, float(np.abs(statistics).max()))
    return float((statistics >= statistics[0] - slack).mean())


def reject(p_values: Mapping[str, float], rate: float) -> set[str]:
    """Names of the tests that find something, with a chance of at most `rate` that any does where nothing is.

    Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    found: set[str] = set()
    for name in sorted(p_values, key=lambda name: p_values[name]):
        if p_values[name] > rate / (len(p_values) - len(found)):
            break
        found.add(name)
    return found


def build_kernel(distances: Square) -> Square:
    """A Gaussian of the distances whose width is their median; images that are equal do not count for that."""
    apart = distances[distances > 0]
    width = np.median(apart) if apart.size else 1.0
    return np.asarray(np.exp(-((distances / width) ** 2) / 2))


def compute_separation(kernel: Square, deals: Deals, groups: Groups) -> Float[np.ndarray, " num_deals"]:
    """How well a kernel ridge regression can tell the two kinds of each deal apart; higher is better.

    It is the maximum mean discrepancy (Gretton et al., "A kernel two-sample test", 2012) with a spectrally
    regularised kernel (Hagrass et al., 2022, arXiv:2212.09201), which does not let a few directions drown the others.
    Like the unbiased estimate, it leaves out what each image has to do with itself, and with others of its group.
    """
    num_images = len(kernel)
    centred = KernelCenterer().fit_transform(kernel)
    hat = np.eye(num_images) - RIDGE * np.linalg.inv(centred + RIDGE * np.eye(num_images))
    hat[groups[:, None] == groups] = 0
    targets = deals - deals.mean(axis=1, keepdims=True)
    return np.asarray(((targets @ hat) * targets).sum(axis=1))


def compute_anderson_darling(scores: Scores, deals: Deals) -> Float[np.ndarray, " num_deals"]:
    """How far the distributions of the two kinds lie apart in each deal, in location, spread or tails.

    A²kN of two samples, equation 6 of Scholz and Stephens, "K-sample Anderson-Darling tests", 1987, which is for scores
    with ties as well.
    """
    _, ties = np.unique(scores, return_counts=True)
    below = ties.cumsum()[:-1]  # images up to each score but the highest
    num_recent = deals.sum(axis=1)
    recent_below = deals[:, np.argsort(scores, kind="stable")].cumsum(axis=1)[:, below - 1]
    gaps = (len(scores) * recent_below - num_recent[:, None] * below) ** 2 / (below * (len(scores) - below))
    return np.asarray(gaps @ ties[:-1] / (num_recent * (len(scores) - num_recent)))


def divide_into_folds(is_recent: Kinds, groups: Groups, seed: int) -> Folds:
    """Positions of images, so that each fold has its part of both kinds, and groups stay whole."""
    divider = StratifiedGroupKFold(NUM_FOLDS, shuffle=True, random_state=seed)
    folds = divider.split(is_recent, is_recent, groups)
    return [held_out for _, held_out in folds]


def compute_witness(kernel: Square, is_recent: Kinds, folds: Folds) -> Scores:
    """How recent each image looks to a kernel ridge regression that was fitted to the other folds; higher is more."""
    everything = np.arange(len(is_recent))
    splits = [(np.setdiff1d(everything, fold), fold) for fold in folds]
    witness = KernelRidge(alpha=RIDGE, kernel="precomputed")
    said = cross_val_predict(witness, kernel, is_recent - is_recent.mean(), cv=splits)
    return np.asarray(said.round(WITNESS_DIGITS))


def compute_effect(is_recent: Kinds, values: Scores, groups: Groups, folds: Folds, seed: int) -> tuple[float, Interval]:
    """The chance that a recent image has the higher value, ties counting half: the mean over folds, and its interval.

    Images are compared within a fold alone, where one function has judged both; the interval is for other images under
    the same functions, and resamples whole groups.
    """
    folds = [fold for fold in folds if 0 < is_recent[fold].sum() < len(fold)]  # few large groups may leave one empty

    def resample(weights: Float[np.ndarray, "num_resamples num_groups"]) -> Mapping[str, np.ndarray]:
        parts = [
            compute_resampled_metrics(is_recent[fold], values[fold], weights[:, groups[fold]])["image_auroc"]
            for fold in folds
        ]
        return {"effect": np.mean(parts, axis=0)}

    effect = float(np.mean([compute_image_auroc(is_recent[fold], values[fold]) for fold in folds]))
    return effect, compute_intervals(resample, int(groups.max()) + 1, seed)["effect"]


def compute_smallest_effect(num_reference: int, num_recent: int, rate: float) -> float:
    """The AUROC of scores from which on a drift is found four times in five; above 1 none is found so surely.

    For the rank-sum test, which scores that move as a whole are found by about as often: Noether, "Sample size
    determination for some common nonparametric tests", 1987.

    Args:
        num_reference: independent images or groups, as `num_recent`.
        rate: of false alarms of one test, in (0, 1).
    """
    deviation = math.sqrt((num_reference + num_recent + 1) / (12 * num_reference * num_recent))
    return 0.5 + float(norm.isf(rate / 2) + norm.ppf(POWER)) * deviation
