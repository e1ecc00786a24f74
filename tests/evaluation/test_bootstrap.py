"""Intervals, against a loop that draws each resample's images and computes the figures on them."""

from functools import partial

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from loupe.evaluation import bootstrap
from loupe.evaluation.bootstrap import _draw_weights, compute_intervals
from loupe.evaluation.classification import compute_classification_metrics, compute_resampled_metrics


def sample(seed, num_images=60, num_labels=4):
    generator = np.random.default_rng(seed)
    targets = generator.integers(0, num_labels, num_images)
    scores = generator.random((num_images, num_labels)) + 0.6 * np.eye(num_labels)[targets]
    return targets, scores / scores.sum(axis=1, keepdims=True)


def mean_of(values):
    return lambda weights: {"mean": weights @ values / len(values)}


def slow_intervals(targets, probabilities, seed, num_resamples):
    rows = []
    for weights in np.concatenate(list(_draw_weights(len(targets), seed, num_resamples))):
        drawn = [image for image, times in enumerate(weights) for _ in range(int(times))]
        rows.append(compute_classification_metrics(targets[drawn], probabilities[drawn]))
    return {name: tuple(np.percentile([row[name] for row in rows], [2.5, 97.5])) for name in rows[0]}


@pytest.mark.parametrize("num_images", [12, 60])  # of twelve images, resamples lack a label now and then
def test_intervals_equal_those_of_a_loop_over_resamples(num_images):
    targets, probabilities = sample(0, num_images)
    statistic = partial(compute_resampled_metrics, targets, probabilities)
    fast = compute_intervals(statistic, num_images, seed=3, num_resamples=200)
    slow = slow_intervals(targets, probabilities, 3, 200)
    assert fast.keys() == slow.keys()
    for name, interval in fast.items():
        assert tuple(interval) == pytest.approx(slow[name]), name


def test_the_interval_of_a_part_is_that_of_the_normal_approximation():
    is_right = np.repeat([1.0, 0.0], [800, 200])
    low, high = compute_intervals(mean_of(is_right), 1000, seed=0, num_resamples=4000)["mean"]
    deviation = norm.ppf(0.975) * np.sqrt(0.8 * 0.2 / 1000)
    assert (low, high) == pytest.approx((0.8 - deviation, 0.8 + deviation), abs=0.003)


def test_nineteen_of_twenty_intervals_hold_the_truth():
    generator = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        low, high = compute_intervals(mean_of(generator.normal(size=100)), 100, seed, num_resamples=300)["mean"]
        held += low <= 0 <= high
    assert 0.9 <= held / 200 <= 0.985


def test_a_figure_of_ranks_has_an_interval_too():
    generator = np.random.default_rng(0)
    is_anomalous = np.arange(40) < 15
    scores = generator.normal(size=40) + is_anomalous

    def compute_auroc(weights):
        return {"auroc": np.array([roc_auc_score(is_anomalous, scores, sample_weight=row) for row in weights])}

    low, high = compute_intervals(compute_auroc, 40, seed=0, num_resamples=200)["auroc"]
    assert 0.5 < low < roc_auc_score(is_anomalous, scores) < high <= 1


def test_the_seed_decides_the_interval():
    values = np.random.default_rng(0).normal(size=50)
    first, again, other = (compute_intervals(mean_of(values), 50, seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.mark.parametrize("num_images", [1, 7, 100])
def test_each_resample_has_as_many_images_as_there_are(num_images):
    weights = np.concatenate(list(_draw_weights(num_images, 0, 30)))
    assert weights.shape == (30, num_images)
    assert (weights.sum(axis=1) == num_images).all()


def test_few_resamples_are_held_at_a_time(monkeypatch):
    monkeypatch.setattr(bootstrap, "WEIGHTS_AT_ONCE", 100)
    assert [len(part) for part in _draw_weights(30, 0, 8)] == [3, 3, 2]


def test_a_figure_that_no_image_changes_has_no_width():
    assert compute_intervals(mean_of(np.ones(20)), 20, seed=0)["mean"] == (1, 1)


def test_resamples_that_do_not_define_a_figure_are_left_out():
    def half_defined(weights):
        return {"half": np.where(np.arange(len(weights)) % 2, 1.0, np.nan), "never": np.full(len(weights), np.nan)}

    intervals = compute_intervals(half_defined, 5, seed=0)
    assert intervals["half"] == (1, 1)
    assert np.isnan(intervals["never"]).all()


def test_no_images_are_an_error():
    with pytest.raises(ValueError, match="at least 1"):
        compute_intervals(mean_of(np.zeros(0)), 0, seed=0)
