import dataclasses
import math

import numpy as np
import pytest
from sklearn.metrics import recall_score, roc_auc_score

from loupe.config import PromoteTask
from loupe.evaluation.promotion import (
    ENOUGH_IMAGES,
    HoldOut,
    Measured,
    compute_metric,
    compute_resampled_metric,
    decide_promotion,
    find_worst,
)

RULES = PromoteTask(
    floor=0.6, worst_floor=0.0, margin=0.0, confidence=0.95, max_latency_growth=2.0, max_size_growth=4.0
)
PETS = HoldOut(np.array(["cat", "dog"] * 50))


def answer(num_right, num_images=100, latency_ms=10.0, num_bytes=1_000_000):
    """A classifier that is right on the first of the images."""
    return Measured((np.arange(num_images) < num_right).astype(np.float64), latency_ms, num_bytes)


def decide(challenger, champion=None, hold_out=PETS, flaw=None, **changes):
    return decide_promotion(hold_out, challenger, champion, RULES.model_copy(update=changes), 0, flaw)


def test_the_first_model_above_the_floor_is_promoted():
    decision = decide(answer(70))
    assert decision.choice == "promoted"
    assert decision.reason == "accuracy 0.7000 passes the floor of 0.6, and there was no champion"


def test_a_model_at_the_floor_passes_it():
    assert decide(answer(60)).choice == "promoted"


@pytest.mark.parametrize("champion", [None, answer(10)])
def test_a_model_below_the_floor_is_never_promoted(champion):
    decision = decide(answer(50), champion)
    assert decision.choice == "kept"
    assert decision.reason == "accuracy 0.5000 is below the floor of 0.6"


@pytest.mark.parametrize("floor", [0.6, -math.inf])
def test_answers_that_are_no_numbers_are_never_promoted(floor):
    hold_out = HoldOut(np.array(["good", "crack"] * 50), "good")
    broken = Measured(np.where(np.arange(100) == 7, np.nan, 1.0), 10.0, 10)
    decision = decide(broken, hold_out=hold_out, floor=floor)
    assert decision.choice == "kept"
    assert not any(isinstance(value, float) and math.isnan(value) for value in decision.figures.values())


def test_a_champion_whose_answers_are_no_numbers_makes_way():
    hold_out = HoldOut(np.array(["good", "crack"] * 50), "good")
    sound, broken = (Measured(scores, 10.0, 10) for scores in (np.arange(100) % 2 * 1.0, np.full(100, np.nan)))
    decision = decide(sound, broken, hold_out)
    assert (decision.choice, decision.reason) == (
        "promoted",
        "image_auroc 1.0000 passes the floor, and the champion's answers are no numbers",
    )


def test_a_model_that_is_surely_better_takes_the_champions_place():
    decision = decide(answer(90), answer(70))
    assert decision.choice == "promoted"
    assert decision.reason.startswith(
        "accuracy 0.9000 is surely above the champion's 0.7000 on the same images: the difference is +0.2000, 95% "
    )
    assert 0 < decision.figures["difference_low"] < 0.2 < decision.figures["difference_high"]


@pytest.mark.parametrize("num_right", [70, 65])
def test_an_equal_or_worse_model_does_not(num_right):
    decision = decide(answer(num_right), answer(70))
    assert decision.choice == "kept"
    assert f"accuracy 0.{num_right}00 is not above the champion's 0.7000 on the same images" in decision.reason


def test_what_may_be_luck_is_undecided():
    decision = decide(answer(72), answer(70))
    assert decision.choice == "undecided"
    assert "may or may not be above the champion's 0.7000 on the same images" in decision.reason


def test_models_that_err_on_other_images_need_a_larger_difference():
    """A paired comparison: the same two accuracies, once with nested errors and once with errors apart."""
    champion = Measured((np.arange(100) >= 20).astype(np.float64), 10.0, 1_000_000)
    assert decide(answer(88), answer(80)).choice == "promoted"
    assert decide(answer(88), champion).choice == "undecided"


@pytest.mark.parametrize(("margin", "choice"), [(0.0, "promoted"), (0.2, "undecided"), (0.4, "kept")])
def test_the_margin_must_be_surpassed(margin, choice):
    decision = decide(answer(90), answer(70), margin=margin)
    assert decision.choice == choice
    assert ("by more than" in decision.reason) == (margin > 0)


def test_more_confidence_asks_for_more_evidence():
    assert decide(answer(74), answer(70), confidence=0.9).choice == "promoted"
    assert decide(answer(74), answer(70), confidence=0.999).choice == "undecided"


def with_seen(champion, num_seen):
    """One that learnt from the first of the images."""
    return dataclasses.replace(champion, has_seen=np.arange(len(champion.answers)) < num_seen)


def test_a_champion_is_not_compared_on_what_it_learnt_from():
    right_on_all, right_on_what_it_knows = answer(90), answer(60)
    ours = Measured((np.arange(100) >= 20).astype(np.float64), 10.0, 1_000_000)
    assert decide(ours, right_on_all).choice == "kept"
    decision = decide(ours, with_seen(right_on_what_it_knows, 60))
    assert decision.choice == "promoted"
    assert decision.reason.startswith(
        "accuracy 0.8000; on the 40 of 100 test images that the champion did not learn from, 1.0000 is surely above "
        "its 0.0000: the difference is +1.0000, 95% interval "
    )
    assert (decision.figures["num_images"], decision.figures["num_compared"]) == (100, 40)


@pytest.mark.parametrize("num_seen", [81, 99, 100])
def test_a_champion_that_learnt_from_too_much_is_undecided(num_seen):
    hold_out = HoldOut(np.array(["good", "crack"] * 50), "good")
    sound = Measured(np.arange(100) % 2 * 1.0, 10.0, 10)
    decision = decide(sound, with_seen(sound, num_seen), hold_out)
    assert (decision.choice, decision.reason) == (
        "undecided",
        "image_auroc 1.0000 passes the floor, and the champion learnt from too many of the test images to be compared",
    )


def test_the_interval_covers_as_often_as_it_says():
    """With models that are equally good, the promoted share is about half of what the interval leaves out."""
    generator, num_promoted = np.random.default_rng(0), 0
    for _ in range(300):
        ours, theirs = (Measured((generator.random(100) < 0.8).astype(np.float64), 10.0, 10) for _ in range(2))
        num_promoted += decide(ours, theirs, floor=0.0, confidence=0.8).choice == "promoted"
    assert 0.06 <= num_promoted / 300 <= 0.14


def test_the_worst_class_has_a_floor_of_its_own():
    labels = np.array(["cat"] * 80 + ["dog"] * 20)
    decision = decide(answer(84), hold_out=HoldOut(labels), worst_floor=0.3)
    assert decision.choice == "kept"
    assert decision.reason == (
        "accuracy 0.8400 does not count, as its recall of dog, 0.2000, is below the floor of 0.3 for the worst"
    )
    assert (decision.figures["worst_label"], decision.figures["worst"]) == ("dog", pytest.approx(0.2))
    assert decide(answer(86), hold_out=HoldOut(labels), worst_floor=0.3).choice == "promoted"


def test_a_class_of_few_images_has_no_floor():
    few = ENOUGH_IMAGES - 1
    labels = np.array(["cat"] * (100 - few) + ["dog"] * few)
    assert decide(answer(100 - few), hold_out=HoldOut(labels), worst_floor=0.3).choice == "promoted"


def test_recall_and_auroc_are_scikit_learns():
    generator = np.random.default_rng(0)
    labels = generator.choice(["good", "crack", "hole"], 90)
    right, scores = generator.integers(0, 2, 90).astype(np.float64), generator.integers(0, 9, 90) / 8
    predicted = np.where(right == 1, labels, "other")
    recalls = recall_score(labels, predicted, labels=["crack", "good", "hole"], average=None)
    assert find_worst(HoldOut(labels), right)[1] == pytest.approx(recalls.min())
    aurocs = [
        roc_auc_score(labels[chosen] == kind, scores[chosen])
        for kind in ("crack", "hole")
        for chosen in [(labels == kind) | (labels == "good")]
    ]
    assert find_worst(HoldOut(labels, "good"), scores)[1] == pytest.approx(min(aurocs))
    assert compute_metric(HoldOut(labels, "good"), scores) == pytest.approx(roc_auc_score(labels != "good", scores))


@pytest.mark.parametrize("normal_label", [None, "good"])
def test_a_resample_is_the_figure_of_the_images_repeated(normal_label):
    generator = np.random.default_rng(1)
    hold_out = HoldOut(generator.choice(["good", "crack"], 40), normal_label)
    answers = generator.integers(0, 2, 40).astype(np.float64)
    weights = generator.multinomial(40, np.full(40, 1 / 40), size=20).astype(np.float64)
    expected = [
        compute_metric(HoldOut(hold_out.labels[rows], normal_label), answers[rows])
        for counts in weights
        for rows in [np.repeat(np.arange(40), counts.astype(int))]
    ]
    np.testing.assert_allclose(compute_resampled_metric(hold_out, answers, weights), expected)


def test_a_detector_is_judged_by_auroc_and_by_its_worst_kind():
    labels = np.array(["good"] * 40 + ["crack"] * 40 + ["hole"] * 20)
    scores = np.concatenate([np.arange(40), np.full(40, 50), np.arange(20)]) * 1.0
    decision = decide(Measured(scores, 10.0, 10), hold_out=HoldOut(labels, "good"), worst_floor=0.5)
    assert decision.reason.startswith("image_auroc 0.7")
    assert "its AUROC of hole, 0.2500, is below the floor of 0.5 for the worst" in decision.reason


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"latency_ms": 20.1}, "it takes 20.1 ms an image, 2.0 times the champion's 10.0 ms where 2 times is allowed"),
        ({"num_bytes": 4_100_000}, "it has 4.10 MB, 4.1 times the champion's 1.00 MB where 4 times is allowed"),
    ],
)
def test_a_better_model_that_is_too_slow_or_too_large_is_kept(change, said):
    grown = dataclasses.replace(answer(90), **change)
    decision = decide(grown, answer(70))
    assert (decision.choice, decision.reason) == ("kept", f"accuracy 0.9000 does not count, as {said}")
    assert decide(grown).choice == "promoted"  # without a champion there is nothing to grow from


def test_growth_within_its_limits_is_no_objection():
    assert decide(answer(90, latency_ms=20.0, num_bytes=4_000_000), answer(70)).choice == "promoted"


@pytest.mark.parametrize("champion", [None, answer(10)])
def test_a_model_with_a_flaw_is_never_promoted_and_the_flaw_is_said(champion):
    decision = decide(answer(90), champion, flaw="its export says otherwise of 3 images")
    assert decision.choice == "kept"
    assert decision.reason == "accuracy 0.9000 does not count, as its export says otherwise of 3 images"


def test_all_objections_are_said():
    decision = decide(answer(50, latency_ms=90.0), answer(10), flaw="its export says otherwise")
    assert decision.reason == (
        "accuracy 0.5000 is below the floor of 0.6; its export says otherwise; it takes 90.0 ms an image, 9.0 times "
        "the champion's 10.0 ms where 2 times is allowed"
    )
