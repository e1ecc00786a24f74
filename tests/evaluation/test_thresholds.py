import math
from fractions import Fraction

import numpy as np
import pytest

from loupe.evaluation.thresholds import compute_threshold

RATES = ["0.01", "0.05", "0.1", "0.25"]


def slow_threshold(scores, rate):
    """The rank by its formula, in exact fractions, in the sorted list."""
    rank = math.ceil((len(scores) + 1) * (1 - Fraction(rate)))
    return sorted(scores.tolist())[min(rank, len(scores)) - 1]


def threshold_by_p_values(scores, rate):
    """The lowest score above which the conformal p-value, (1 + number above) / (n + 1), is at most the rate."""
    for candidate in sorted(set(scores.tolist())):
        if Fraction(1 + int((scores > candidate).sum()), len(scores) + 1) <= Fraction(rate):
            return candidate
    return scores.max()


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("num_images", [1, 2, 9, 10, 19, 20, 37, 99, 100, 199, 500])
@pytest.mark.parametrize("ties", [False, True])
def test_the_threshold_is_the_sorted_score_of_its_rank(num_images, rate, ties):
    scores = np.random.default_rng(num_images).normal(size=num_images)
    scores = np.round(scores) if ties else scores
    assert compute_threshold(scores, float(rate)) == slow_threshold(scores, rate)
    assert compute_threshold(scores, float(rate)) == threshold_by_p_values(scores, rate)


def test_the_order_of_scores_does_not_count_and_stays():
    scores = np.array([3.0, 1.0, 2.0])
    assert compute_threshold(scores, 0.5) == 2.0
    assert scores.tolist() == [3.0, 1.0, 2.0]


def test_too_few_images_for_the_rate_give_the_largest_score():
    assert compute_threshold(np.arange(5.0), 0.01) == 4.0


def test_one_image_gives_its_score():
    assert compute_threshold(np.array([0.7]), 0.5) == 0.7


def test_scores_that_are_all_equal_give_that_score():
    assert compute_threshold(np.full(50, 0.3), 0.05) == 0.3


def test_a_smaller_rate_never_gives_a_lower_threshold():
    scores = np.random.default_rng(0).normal(size=80)
    thresholds = [compute_threshold(scores, rate) for rate in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)]
    assert thresholds == sorted(thresholds, reverse=True)


def test_single_precision_will_do():
    assert compute_threshold(np.arange(20, dtype=np.float32), 0.1) == 18.0


def test_no_scores_are_an_error():
    with pytest.raises(ValueError, match="must hold at least one normal calibration image, got none"):
        compute_threshold(np.zeros(0), 0.05)


@pytest.mark.parametrize(("num_calibration", "rate"), [(19, 0.05), (99, 0.05), (99, 0.1)])
def test_over_200_resamplings_the_realised_rate_of_false_alarms_is_near_the_promised(num_calibration, rate):
    """In these sizes the promise is exact: each resampling's rate is beta distributed about it, and so the number
    of flagged ones among the new images beta-binomial."""
    generator, num_resamplings, num_new = np.random.default_rng(0), 200, 100
    rates = []
    for _ in range(num_resamplings):
        scores = generator.gamma(2.0, size=num_calibration + num_new)
        threshold = compute_threshold(scores[:num_calibration], rate)
        rates.append((scores[num_calibration:] > threshold).mean())
    variance = rate * (1 - rate) / num_new * (1 + (num_new - 1) / (num_calibration + 2))
    assert abs(np.mean(rates) - rate) < 3 * math.sqrt(variance / num_resamplings)
