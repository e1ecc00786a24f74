"""All figures of one test together, on whole and on odd test sets."""

import json
import math

import numpy as np
import pytest

from loupe.evaluation.classification import compute_class_metrics, compute_top_3_accuracy, name_metrics
from loupe.evaluation.judgement import Answers, judge_classifier

NONE = Answers(np.zeros(0, np.int64), np.zeros((0, 3)))


def answer(seed, num_images=80, num_labels=3, present=3, dtype=np.float64):
    generator = np.random.default_rng(seed)
    targets = generator.integers(0, present, num_images)
    scores = generator.random((num_images, num_labels)) + 0.6 * np.eye(num_labels)[targets]
    return Answers(targets, (scores / scores.sum(axis=1, keepdims=True)).astype(dtype))


def slow_class_metrics(targets, predicted, label):
    pairs = list(zip(targets.tolist(), predicted.tolist(), strict=True))
    hits = sum(true == guess == label for true, guess in pairs)
    num_true, num_guessed = (sum(pair[side] == label for pair in pairs) for side in (0, 1))

    def divide(top, bottom):
        return top / bottom if bottom else math.nan

    return divide(hits, num_guessed), divide(hits, num_true), divide(2 * hits, num_true + num_guessed), num_true


@pytest.mark.parametrize("present", [1, 3, 4])
def test_figures_of_each_label_equal_their_definitions(present):
    answers = answer(0, num_images=12, num_labels=5, present=present)
    table = compute_class_metrics(answers.targets, answers.predicted, 5)
    for label, row in table.iterrows():
        slow = slow_class_metrics(answers.targets, answers.predicted, label)
        assert row.tolist() == pytest.approx(slow, nan_ok=True)


def test_top_3_is_how_often_the_label_is_among_the_three_likeliest():
    answers = answer(0, num_labels=5, present=5)
    likeliest = [sorted(range(5), key=lambda label: -row[label])[:3] for row in answers.probabilities]
    slow = np.mean([target in three for target, three in zip(answers.targets, likeliest, strict=True)])
    assert compute_top_3_accuracy(answers.targets, answers.probabilities) == pytest.approx(slow)


def test_among_three_labels_top_3_says_nothing():
    answers = answer(0)
    assert math.isnan(compute_top_3_accuracy(answers.targets, answers.probabilities))


def test_metrics_have_flat_names_with_intervals_and_labels():
    metrics = judge_classifier(answer(0), answer(1), 0).to_metrics(["cat", "dog", "sea lion"])
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "log_loss"):
        assert metrics[f"{name}_low"] < metrics[name] < metrics[f"{name}_high"]
    assert {"temperature", "calibration_error", "calibration_error_scaled", "area_under_risk_coverage"} <= set(metrics)
    assert {f"{kind}/sea lion" for kind in ("precision", "recall", "f1", "support")} <= set(metrics)
    assert metrics["support/cat"] + metrics["support/dog"] + metrics["support/sea lion"] == 80
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_the_temperature_comes_from_calibration_images_alone():
    first, second = (judge_classifier(answer(seed), answer(9), 0) for seed in (0, 1))
    assert first.temperature == second.temperature
    assert judge_classifier(answer(0), answer(8), 0).temperature != first.temperature


def test_without_calibration_images_nothing_is_scaled():
    judgement = judge_classifier(answer(0), NONE, 0)
    assert judgement.temperature is None
    assert judgement.scaled is None
    assert not {"temperature", "calibration_error_scaled", "log_loss_scaled"} & set(judgement.to_metrics(list("abc")))


def test_a_label_that_test_lacks_has_no_recall_and_changes_no_mean():
    judgement = judge_classifier(answer(0, present=2), answer(1), 0)
    metrics = judgement.to_metrics(list("abc"))
    assert "recall/c" not in metrics
    assert metrics["support/c"] == 0
    assert metrics["balanced_accuracy"] == pytest.approx((metrics["recall/a"] + metrics["recall/b"]) / 2)


@pytest.mark.parametrize(
    ("test", "num_labels"),
    [
        (answer(0, present=1), 3),
        (answer(0, num_labels=2, present=2), 2),
        (answer(0, num_images=1), 3),
        (answer(0, dtype=np.float32), 3),
        (Answers(np.array([0, 1, 2]), np.full((3, 3), 1 / 3)), 3),
        (Answers(np.array([0, 1, 2]), np.eye(3)), 3),
    ],
    ids=["one label present", "two labels", "one image", "single precision", "all ties", "perfect"],
)
def test_odd_test_sets_have_finite_figures(test, num_labels):
    metrics = judge_classifier(test, test, 0).to_metrics([str(label) for label in range(num_labels)])
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["accuracy_low"] <= metrics["accuracy"] <= metrics["accuracy_high"]


def test_names_hold_only_what_mlflow_takes_and_no_two_are_equal():
    labels = ["a+b", "a*b", "a_b", "sea lion", "x/y", "..", "Ä:1.5-2", "n" * 999, "a_b_2", "a+b_2"]
    names = name_metrics(labels)
    assert names[:3] == ["a_b", "a_b_2", "a_b_3"]
    assert names[3:7] == ["sea lion", "x_y", "_", "Ä:1.5-2"]
    assert len(set(names)) == len(labels)
    from mlflow.utils.validation import _validate_metric_name

    for name in names:
        _validate_metric_name(f"classifier/test/precision/{name}")
        assert len(f"classifier/test/precision/{name}") <= 250
