import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from loupe.errors import ConfigError
from loupe.evaluation.thresholds import (
    check_false_alarm_rate,
    choose_false_alarm_rate,
    choose_rate_by_cost,
    compute_threshold,
    explain_threshold,
    is_supported,
)

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


@pytest.mark.parametrize(("num_calibration", "rate"), [(12, 0.1), (30, 0.05), (99, 0.05), (199, 0.1)])
def test_over_2000_calibration_sets_the_realised_rate_is_as_explained(num_calibration, rate):
    """Scores are uniform, so that the rate above a threshold t is 1 - t, without any sampling of new images."""
    generator, num_sets = np.random.default_rng(1), 2000
    explained = [explain_threshold(generator.random(num_calibration), rate) for _ in range(num_sets)]
    realised = np.array([1 - one.value for one in explained])
    assert abs(realised.mean() - explained[0].rate) < 3 * realised.std() / math.sqrt(num_sets)
    within = np.mean((realised >= explained[0].low_rate) & (realised <= explained[0].high_rate))
    assert abs(within - 0.9) < 3 * math.sqrt(0.9 * 0.1 / num_sets)
    assert explained[0].rate <= rate


@pytest.mark.parametrize(("num_calibration", "rate"), [(12, 1 / 13), (19, 0.05), (9, 0.1), (48, 1 / 49), (6, 1 / 7)])
def test_the_lowest_rate_that_can_be_promised_is_promised(num_calibration, rate):
    scores = np.random.default_rng(0).random(num_calibration)
    explained = explain_threshold(scores, rate)
    assert explained.value == scores.max()
    assert explained.rate == pytest.approx(rate)
    assert is_supported(rate, num_calibration)
    assert not is_supported(rate, num_calibration - 1)


def test_what_few_images_can_not_promise_is_said_in_words():
    words = explain_threshold(np.arange(12.0), 0.05).describe()
    assert words.startswith("On average at most 7.7% of new normal images score above it, by 12 normal calibration")
    assert words.endswith(
        "5% was asked for, but with 12 calibration images the lowest rate that can be promised is 1/13 = 0.077."
    )
    assert "asked" not in explain_threshold(np.arange(12.0), 0.1).describe()
    assert "by 1 normal calibration image." in explain_threshold(np.arange(1.0), 0.5).describe()


@pytest.mark.parametrize(("rate", "needed"), [(0.05, 19), (0.01, 99), (0.1, 9), (0.3, 3), (0.001, 999)])
def test_a_rate_that_the_images_can_not_promise_is_refused_with_how_many_it_takes(rate, needed):
    check_false_alarm_rate(rate, needed)
    with pytest.raises(ConfigError, match=f"takes at least {needed:,} normal calibration images: with {needed - 1}"):
        check_false_alarm_rate(rate, needed - 1)


def test_a_rate_of_next_to_nothing_is_refused():
    with pytest.raises(ConfigError, match="lowest rate that can be promised is 1/11"):
        check_false_alarm_rate(1e-12, 10)


@given(num_calibration=st.integers(1, 100_000))
def test_auto_is_always_supported_and_never_below_the_usual_rate(num_calibration):
    rate = choose_false_alarm_rate(num_calibration)
    check_false_alarm_rate(rate, num_calibration)
    assert rate == 0.05 or num_calibration < 19
    assert rate >= 0.05


@pytest.mark.parametrize(
    ("cost_false_alarm", "cost_miss", "fraction"), [(1.0, 10.0, 0.05), (1.0, 1.0, 0.01), (5.0, 2.0, 0.3)]
)
def test_the_rate_by_cost_is_the_largest_that_is_cheapest_for_any_detector_of_the_assumed_kind(
    cost_false_alarm, cost_miss, fraction
):
    """Of a detector whose anomalous p-values have the density q p^(q - 1), p^q are found at the rate p."""

    def cheapest(q):
        def cost(log_rate):
            rate = math.exp(log_rate)
            return (1 - fraction) * cost_false_alarm * rate + fraction * cost_miss * (1 - rate**q)

        return math.exp(minimize_scalar(cost, bounds=(-40, 0), method="bounded", options={"xatol": 1e-9}).x)

    largest = max(cheapest(q) for q in np.linspace(0.01, 0.99, 491))
    assert choose_rate_by_cost(cost_false_alarm, cost_miss, fraction) == pytest.approx(largest, rel=1e-3)


def test_dearer_misses_and_more_defects_allow_more_false_alarms():
    rates = [choose_rate_by_cost(1.0, cost, 0.02) for cost in (1.0, 5.0, 20.0)]
    assert rates == sorted(rates)
    assert choose_rate_by_cost(1.0, 5.0, 0.04) > rates[1]
    assert choose_rate_by_cost(10.0, 50.0, 0.02) == pytest.approx(rates[1])


def test_costs_by_which_every_image_would_be_flagged_are_refused():
    with pytest.raises(ConfigError, match="it pays to flag every image, which takes no detector"):
        choose_rate_by_cost(1.0, 100.0, 0.05)
