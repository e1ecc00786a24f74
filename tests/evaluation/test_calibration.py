"""Calibration and coverage, against loops over images, bins and temperatures."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from loupe.evaluation.calibration import (
    compute_area_under_risk_coverage,
    compute_calibrated_loss,
    compute_calibration_error,
    compute_coverage,
    compute_reliability,
    fit_temperature,
    scale_probabilities,
)


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def sample(seed, num_images=200, num_labels=4, overconfidence=1.0):
    """Targets drawn from the probabilities of some logits, and what a classifier says that multiplies the logits."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(num_images, num_labels)) * 2
    targets = np.array([generator.choice(num_labels, p=row) for row in softmax(logits)])
    return targets, softmax(logits * overconfidence)


def slow_calibration_error(targets, probabilities, num_bins):
    rows = [
        (max(row), row.index(max(row)) == target) for row, target in zip(probabilities.tolist(), targets, strict=True)
    ]
    error = 0.0
    for number in range(num_bins):
        inside = [row for row in rows if number / num_bins < row[0] <= (number + 1) / num_bins]
        if inside:
            confidence = sum(row[0] for row in inside) / len(inside)
            accuracy = sum(row[1] for row in inside) / len(inside)
            error += len(inside) / len(rows) * abs(accuracy - confidence)
    return error


def slow_area(targets, probabilities):
    """Risks of the k surest, averaged over many random orders of those that are equally sure."""
    generator = np.random.default_rng(0)
    confidence, wrong = probabilities.max(axis=1), probabilities.argmax(axis=1) != targets
    areas = []
    for _ in range(2000):
        order = np.lexsort((generator.random(len(targets)), -confidence))
        areas.append(np.mean([wrong[order[:number]].mean() for number in range(1, len(targets) + 1)]))
    return np.mean(areas)


@pytest.mark.parametrize("num_bins", [1, 2, 15])
@pytest.mark.parametrize("seed", range(3))
def test_the_calibration_error_equals_its_definition_and_that_of_torchmetrics(seed, num_bins):
    targets, probabilities = sample(seed, overconfidence=2)
    error = compute_calibration_error(compute_reliability(targets, probabilities, num_bins))
    assert error == pytest.approx(slow_calibration_error(targets, probabilities, num_bins))
    theirs = multiclass_calibration_error(torch.from_numpy(probabilities), torch.from_numpy(targets), 4, num_bins)
    assert error == pytest.approx(float(theirs), abs=1e-6)


def test_the_reliability_diagram_has_means_of_each_bin():
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.5, 0.5]])
    counts, confidence, accuracy = compute_reliability(np.array([0, 1, 1, 1]), probabilities, 4)
    assert counts.tolist() == [0, 1, 1, 2]
    np.testing.assert_allclose(confidence, [np.nan, 0.5, 0.6, 0.85])
    np.testing.assert_allclose(accuracy, [np.nan, 0, 1, 0.5])


def test_certainty_falls_into_the_last_bin_and_may_be_all_wrong():
    right, wrong = (compute_reliability(np.array([0, 0]), np.eye(2)[[label, label]]) for label in (0, 1))
    assert right.counts[-1] == wrong.counts[-1] == 2
    assert compute_calibration_error(right) == 0
    assert compute_calibration_error(wrong) == 1


def test_without_images_errors_and_areas_are_not_defined():
    empty = np.zeros(0, np.int64), np.zeros((0, 3))
    assert math.isnan(compute_calibration_error(compute_reliability(*empty)))
    assert math.isnan(compute_area_under_risk_coverage(*empty))


@pytest.mark.parametrize("overconfidence", [0.5, 1.0, 3.0])
def test_the_temperature_is_the_best_of_a_grid(overconfidence):
    targets, probabilities = sample(0, overconfidence=overconfidence)
    grid = np.exp(np.linspace(np.log(0.1), np.log(10), 2001))
    losses = [log_loss(targets, scale_probabilities(probabilities, one), labels=range(4)) for one in grid]
    assert fit_temperature(targets, probabilities) == pytest.approx(grid[int(np.argmin(losses))], rel=0.005)


def test_the_temperature_undoes_overconfidence():
    targets, probabilities = sample(1, num_images=4000, overconfidence=3)
    temperature = fit_temperature(targets, probabilities)
    assert temperature == pytest.approx(3, rel=0.1)
    before, after = (
        compute_calibration_error(compute_reliability(targets, values))
        for values in (probabilities, scale_probabilities(probabilities, temperature))
    )
    assert after < 0.3 * before


@pytest.mark.parametrize(("target", "end"), [(0, 0.1), (1, 10.0)])
def test_where_all_is_right_or_all_is_wrong_the_temperature_is_at_an_end(target, end):
    assert fit_temperature(np.array([target]), np.array([[0.9, 0.1]])) == pytest.approx(end, rel=0.01)


def test_probabilities_that_are_all_equal_have_some_temperature_and_stay_equal():
    targets, even = np.array([0, 1]), np.full((2, 2), 0.5)
    np.testing.assert_allclose(scale_probabilities(even, fit_temperature(targets, even)), even)


def test_no_calibration_images_are_an_error():
    with pytest.raises(ValueError, match="at least one calibration image"):
        fit_temperature(np.zeros(0, np.int64), np.zeros((0, 3)))


def test_scaling_is_softmax_of_divided_logits():
    logits = np.random.default_rng(0).normal(size=(20, 5)) * 3
    np.testing.assert_allclose(scale_probabilities(softmax(logits), 1.7), softmax(logits / 1.7))
    np.testing.assert_allclose(scale_probabilities(softmax(logits), 1.0), softmax(logits))


def test_scaling_survives_certainty_in_single_precision():
    scaled = scale_probabilities(np.array([[1.0, 0.0]], np.float32), 10.0)
    assert np.isfinite(scaled).all()
    assert scaled.sum() == pytest.approx(1)


@pytest.mark.parametrize("seed", range(3))
def test_the_area_under_risk_coverage_equals_its_definition(seed):
    targets, probabilities = sample(seed, num_images=30)
    assert compute_area_under_risk_coverage(targets, probabilities) == pytest.approx(slow_area(targets, probabilities))


def test_equally_sure_images_have_no_order():
    probabilities = np.array([[0.9, 0.1], [0.7, 0.3], [0.7, 0.3], [0.7, 0.3], [0.6, 0.4]])
    targets = np.array([0, 0, 1, 0, 1])
    area = compute_area_under_risk_coverage(targets, probabilities)
    assert area == pytest.approx(slow_area(targets, probabilities), abs=0.01)
    assert area == compute_area_under_risk_coverage(targets[[3, 2, 1, 0, 4]], probabilities[[3, 2, 1, 0, 4]])
    coverage = compute_coverage(targets, probabilities)
    np.testing.assert_allclose(coverage.coverage, [0.2, 0.8, 1])
    np.testing.assert_allclose(coverage.accuracy, [1, 0.75, 0.6])
    np.testing.assert_allclose(coverage.confidence, [0.9, 0.7, 0.6])


def test_one_confidence_for_all_has_one_point_and_the_error_rate_as_area():
    targets, even = np.array([0, 1, 1, 0]), np.full((4, 2), 0.5)
    assert len(compute_coverage(targets, even).coverage) == 1
    assert compute_area_under_risk_coverage(targets, even) == pytest.approx(0.5)


def test_a_classifier_that_knows_its_errors_has_a_small_area():
    targets = np.zeros(4, np.int64)
    knows = np.array([[0.99, 0.01], [0.98, 0.02], [0.97, 0.03], [0.49, 0.51]])
    does_not = np.array([[0.6, 0.4], [0.61, 0.39], [0.62, 0.38], [0.01, 0.99]])
    assert compute_area_under_risk_coverage(targets, knows) == pytest.approx(1 / 16)
    assert compute_area_under_risk_coverage(targets, does_not) == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)


def test_being_too_sure_does_not_count_against_an_epoch():
    generator = np.random.default_rng(0)
    targets = generator.integers(0, 3, 60)
    logits = torch.from_numpy(generator.normal(size=(60, 3)) + 2 * np.eye(3)[targets])
    plain, sure = (compute_calibrated_loss(targets, (scale * logits).softmax(dim=1).numpy()) for scale in (1.0, 4.0))
    slow = min(F.cross_entropy(logits / t, torch.from_numpy(targets)).item() for t in np.geomspace(0.1, 10, 2_000))
    assert sure == pytest.approx(plain, rel=1e-3) == pytest.approx(slow, rel=1e-3)
    assert F.cross_entropy(4 * logits, torch.from_numpy(targets)) > 1.2 * plain


def test_an_epoch_that_knows_nothing_is_never_better_than_one_that_knows_a_little_and_is_too_sure():
    targets = np.repeat([0, 1], 10)
    knows_nothing = np.full((20, 2), 0.5)
    right = np.r_[np.ones(7), np.zeros(3)].astype(bool)
    knows_a_little = np.where(np.r_[right, ~right][:, None], [0.999, 0.001], [0.001, 0.999])
    assert log_loss(targets, knows_a_little) > log_loss(targets, knows_nothing)
    assert compute_calibrated_loss(targets, knows_a_little) < compute_calibrated_loss(targets, knows_nothing)
