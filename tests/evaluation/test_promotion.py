import math

import pytest

from loupe.evaluation.promotion import decide_promotion


def decide(challenger, champion, floor=0.6, margin=0.0, flaw=None):
    return decide_promotion("accuracy", challenger, champion, floor, margin, flaw)


def test_the_first_model_above_the_floor_is_promoted():
    decision = decide(0.7, None)
    assert decision.promoted
    assert decision.reason == "accuracy 0.7000 passes the floor of 0.6, and there was no champion"


def test_a_model_at_the_floor_passes_it():
    assert decide(0.6, None).promoted


@pytest.mark.parametrize("champion", [None, 0.1])
def test_a_model_below_the_floor_is_never_promoted(champion):
    decision = decide(0.5, champion)
    assert not decision.promoted
    assert decision.reason == "accuracy 0.5000 is below the floor of 0.6"


@pytest.mark.parametrize("champion", [None, 0.1])
def test_a_figure_that_is_no_number_is_never_promoted(champion):
    assert not decide(math.nan, champion).promoted
    assert not decide(math.nan, champion, floor=-math.inf).promoted


def test_a_better_model_takes_the_champions_place():
    decision = decide(0.8, 0.7)
    assert decision.promoted
    assert decision.reason == "accuracy 0.8000 is above the champion's 0.7000 on the same images"


@pytest.mark.parametrize("challenger", [0.7, 0.65])
def test_an_equal_or_worse_model_does_not(challenger):
    decision = decide(challenger, 0.7)
    assert not decision.promoted
    assert decision.reason == f"accuracy {challenger:.4f} is not above the champion's 0.7000 on the same images"


@pytest.mark.parametrize(("challenger", "promoted"), [(0.74, False), (0.75, False), (0.76, True)])
def test_the_margin_must_be_surpassed(challenger, promoted):
    decision = decide(challenger, 0.7, margin=0.05)
    assert decision.promoted == promoted
    assert "the champion's 0.7000 on the same images plus the margin of 0.05" in decision.reason


@pytest.mark.parametrize("champion", [None, 0.1])
def test_a_model_with_a_flaw_is_never_promoted_and_the_flaw_is_said(champion):
    decision = decide(0.9, champion, flaw="its export says otherwise of 3 images")
    assert not decision.promoted
    assert decision.reason == "accuracy 0.9000 does not count, as its export says otherwise of 3 images"


def test_a_figure_below_the_floor_is_the_first_reason():
    assert decide(0.5, None, flaw="its export says otherwise").reason == "accuracy 0.5000 is below the floor of 0.6"
