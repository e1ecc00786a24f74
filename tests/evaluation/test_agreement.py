import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loupe.evaluation.agreement import TOLERANCE, compare_anomalies, compare_scores

SURE = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]])


def test_what_is_equal_agrees():
    agreement = compare_scores(SURE, SURE)
    assert agreement.agrees
    assert (agreement.largest_difference, agreement.num_different_decisions, agreement.num_images) == (0.0, 0, 2)


@pytest.mark.parametrize(("shift", "agrees"), [(0.9 * TOLERANCE, True), (1.1 * TOLERANCE, False)])
def test_the_largest_difference_of_all_decides(shift, agrees):
    other = SURE.copy()
    other[1] += (0, shift, -shift / 2)
    agreement = compare_scores(SURE, other)
    assert agreement.largest_difference == pytest.approx(shift)
    assert agreement.agrees == agrees


def test_an_image_decided_otherwise_is_a_disagreement_whatever_is_tolerated():
    agreement = compare_scores(np.array([[0.6, 0.4], [0.9, 0.1]]), np.array([[0.4, 0.6], [0.9, 0.1]]), tolerance=0.19)
    assert agreement.num_different_decisions == 1
    assert not agreement.agrees
    between = compare_scores(np.array([[0.503, 0.497]]), np.array([[0.499, 0.501]]), tolerance=0.005)
    assert between.largest_difference < 0.005
    assert not between.agrees


def test_two_labels_that_are_nearly_level_are_a_tie_and_no_disagreement():
    agreement = compare_scores(np.array([[0.5002, 0.4998, 0.0]]), np.array([[0.4999, 0.5001, 0.0]]))
    assert (agreement.num_different_decisions, agreement.num_ties) == (0, 1)
    assert agreement.agrees


def test_a_tie_of_the_top_two_excuses_no_third():
    agreement = compare_scores(np.array([[0.45, 0.45, 0.1]]), np.array([[0.3, 0.3, 0.4]]))
    assert (agreement.num_different_decisions, agreement.num_ties) == (1, 0)


@pytest.mark.parametrize("ours", [True, False])
def test_what_is_no_number_is_a_disagreement(ours):
    broken = SURE.copy()
    broken[0, 2] = np.nan
    agreement = compare_scores(broken, SURE) if ours else compare_scores(SURE, broken)
    assert not agreement.agrees
    assert np.isnan(agreement.largest_difference)
    assert not compare_scores(broken, broken).agrees


def test_nothing_compared_is_no_agreement():
    agreement = compare_scores(np.empty((0, 3)), np.empty((0, 3)))
    assert not agreement.agrees
    assert agreement.num_images == 0
    assert agreement.describe() == "no image was compared"


def test_the_arguments_stay_as_they_were_and_float32_will_do():
    ours = SURE.astype(np.float32)
    before = ours.copy()
    assert compare_scores(ours, ours + np.float32(1e-5)).largest_difference == pytest.approx(1e-5, rel=0.02)
    np.testing.assert_array_equal(ours, before)


def test_the_figures_are_said_in_words_and_are_plain_values():
    agreement = compare_scores(np.array([[0.75, 0.25], [0.25, 0.75]]), np.array([[0.75, 0.25], [0.5625, 0.4375]]))
    assert agreement.describe() == (
        "1 of 2 images are decided otherwise, and scores differ by up to 0.312 where 0.001 is allowed"
    )
    assert json.loads(json.dumps(asdict(agreement)))["agrees"] is False


@given(st.integers(0, 2**32 - 1), st.floats(1e-5, 0.3))
def test_agreement_is_what_a_slow_comparison_finds(seed, tolerance):
    generator = np.random.default_rng(seed)
    ours = generator.dirichlet(np.ones(3), 6)
    theirs = generator.choice([0.0, 1e-4, 0.2], (6, 1)) * generator.normal(size=(6, 3)) + ours
    agreement = compare_scores(ours, theirs, tolerance)
    different = [
        row
        for row in range(6)
        if ours[row].argmax() != theirs[row].argmax() and ours[row].max() - ours[row][theirs[row].argmax()] > tolerance
    ]
    far = max(abs(a - b) for a, b in zip(ours.ravel(), theirs.ravel(), strict=True))
    assert agreement.num_different_decisions == len(different)
    assert agreement.agrees == (not different and far <= tolerance)


def draw_anomalies(seed=0, sizes=(3, 2)):
    """Batches of scores and maps, with float32's own precision."""
    generator = np.random.default_rng(seed)
    return [
        (generator.normal(5, 2, size).astype(np.float32), generator.normal(1, 3, (size, 4, 6)).astype(np.float32))
        for size in sizes
    ]


def compare(ours, theirs, threshold=5.0):
    return compare_anomalies(zip(ours, theirs, strict=True), threshold)


def test_equal_anomalies_agree():
    agreement = compare(draw_anomalies(), draw_anomalies())
    assert (agreement.agrees, agreement.largest_difference, agreement.num_images) == (True, 0.0, 5)


@pytest.mark.parametrize("of_maps", [True, False])
@pytest.mark.parametrize(("part", "agrees"), [(0.9, True), (1.1, False)])
def test_differences_are_in_standard_deviations_of_all_batches(of_maps, part, agrees):
    ours, theirs = draw_anomalies(), draw_anomalies()
    std = np.concatenate([batch[of_maps].reshape(-1) for batch in ours]).astype(np.float64).std()
    shift = part * TOLERANCE * std
    if of_maps:
        theirs[1][1][0, 2, 3] += shift
    else:
        theirs[1][0][1] += shift
    agreement = compare(ours, theirs, threshold=-100.0)
    assert agreement.largest_difference == pytest.approx(part * TOLERANCE, rel=1e-2)
    assert agreement.agrees == agrees


def test_a_flag_that_is_lost_is_a_disagreement_unless_it_is_at_the_threshold():
    scores, maps = np.array([1.0, 2.0, 3.0], np.float32), np.ones((3, 2, 2), np.float32)
    nearly = scores + np.array([0, 1e-5, 0], np.float32)
    tie = compare([(scores, maps)], [(nearly, maps)], threshold=2.0)
    assert (tie.agrees, tie.num_different_decisions, tie.num_ties) == (True, 0, 1)
    other = compare([(scores, maps)], [(scores[[1, 0, 2]], maps)], threshold=1.5)
    assert (other.agrees, other.num_different_decisions) == (False, 2)


@pytest.mark.parametrize("broken", [0, 1])
def test_anomalies_that_are_no_numbers_are_a_disagreement(broken):
    theirs = draw_anomalies()
    theirs[0][broken][0] = np.nan
    assert not compare(draw_anomalies(), theirs).agrees
    assert not compare(theirs, draw_anomalies()).agrees


def test_no_anomalies_are_no_agreement_and_constant_ones_agree_with_themselves_alone():
    assert not compare([], []).agrees
    constant = (np.ones(2, np.float32), np.ones((2, 3, 3), np.float32))
    assert compare([constant], [constant]).agrees
    assert not compare([constant], [(constant[0], constant[1] + np.float32(1e-3))]).agrees
