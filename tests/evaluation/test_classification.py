import math

import numpy as np
import pandas as pd
import pytest

from loupe.evaluation.classification import build_predictions, compute_classification_metrics, compute_confusion


def sample(seed, num_images=40, num_labels=4, present=4):
    """Targets of the first `present` labels, and probabilities that lean towards them."""
    generator = np.random.default_rng(seed)
    targets = generator.integers(0, present, num_images)
    scores = generator.random((num_images, num_labels)) + 0.6 * np.eye(num_labels)[targets]
    return targets, scores / scores.sum(axis=1, keepdims=True)


def slow_metrics(targets, probabilities):
    """The definitions, one image at a time."""
    predicted = [max(range(len(row)), key=lambda label: row[label]) for row in probabilities.tolist()]
    pairs = list(zip(targets.tolist(), predicted, strict=True))
    recalls, f1s = [], []
    for label in sorted(set(targets.tolist())):
        hits = sum(1 for true, guess in pairs if true == guess == label)
        num_true = sum(1 for true, _ in pairs if true == label)
        num_guessed = sum(1 for _, guess in pairs if guess == label)
        recalls.append(hits / num_true)
        f1s.append(2 * hits / (num_true + num_guessed))
    return {
        "accuracy": sum(true == guess for true, guess in pairs) / len(pairs),
        "balanced_accuracy": sum(recalls) / len(recalls),
        "macro_f1": sum(f1s) / len(f1s),
        "log_loss": -sum(math.log(row[true]) for row, (true, _) in zip(probabilities.tolist(), pairs, strict=True))
        / len(pairs),
    }


@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_their_definitions(seed):
    targets, probabilities = sample(seed)
    assert compute_classification_metrics(targets, probabilities) == pytest.approx(slow_metrics(targets, probabilities))


def test_metrics_equal_their_definitions_where_a_predicted_class_is_not_among_the_targets():
    targets, probabilities = sample(0, present=3)
    assert 3 in probabilities.argmax(axis=1)
    assert compute_classification_metrics(targets, probabilities) == pytest.approx(slow_metrics(targets, probabilities))


def test_metrics_equal_their_definitions_where_one_class_alone_occurs():
    targets, probabilities = sample(0, present=1)
    assert compute_classification_metrics(targets, probabilities) == pytest.approx(slow_metrics(targets, probabilities))


def test_metrics_of_one_image_are_defined():
    metrics = compute_classification_metrics(np.array([1]), np.array([[0.25, 0.75]]))
    assert metrics == pytest.approx({"accuracy": 1, "balanced_accuracy": 1, "macro_f1": 1, "log_loss": -math.log(0.75)})


def test_perfect_predictions_are_perfect_by_every_metric():
    metrics = compute_classification_metrics(np.arange(4), np.eye(4))
    assert metrics == pytest.approx({"accuracy": 1, "balanced_accuracy": 1, "macro_f1": 1, "log_loss": 0}, abs=1e-9)


def test_always_guessing_the_common_class_is_accurate_and_not_balanced():
    targets = np.array([0] * 9 + [1])
    metrics = compute_classification_metrics(targets, np.tile([0.9, 0.1], (10, 1)))
    assert metrics["accuracy"] == pytest.approx(0.9)
    assert metrics["balanced_accuracy"] == pytest.approx(0.5)


def test_ties_go_to_the_first_class():
    metrics = compute_classification_metrics(np.array([0, 1]), np.full((2, 2), 0.5))
    assert metrics["accuracy"] == 0.5
    assert metrics["log_loss"] == pytest.approx(math.log(2))


def test_a_wrong_answer_given_with_certainty_costs_much_and_not_infinitely():
    assert 10 < compute_classification_metrics(np.array([0]), np.array([[0.0, 1.0]]))["log_loss"] < 1000


def test_single_precision_will_do():
    targets, probabilities = sample(1)
    single = compute_classification_metrics(targets, probabilities.astype(np.float32))
    assert single == pytest.approx(compute_classification_metrics(targets, probabilities), abs=1e-6)


def test_an_empty_test_set_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        compute_classification_metrics(np.zeros(0, np.int64), np.zeros((0, 3)))


def test_computing_does_not_change_the_probabilities():
    targets, probabilities = sample(2)
    before = probabilities.copy()
    compute_classification_metrics(targets, probabilities)
    np.testing.assert_array_equal(probabilities, before)


def test_a_row_of_the_confusion_is_a_true_label():
    counts = compute_confusion(np.array([0, 0, 1]), np.array([1, 0, 1]), 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]


def test_predictions_hold_a_row_an_image_and_a_probability_a_class():
    targets, probabilities = np.array([1, 0]), np.array([[0.2, 0.8], [0.3, 0.7]])
    table = build_predictions(pd.Series(["a", "b"], index=[7, 3]), targets, probabilities, ["cat", "dog"])
    assert table.to_dict("list") == {
        "image_id": ["a", "b"],
        "label": ["dog", "cat"],
        "predicted": ["dog", "dog"],
        "probability_cat": [0.2, 0.3],
        "probability_dog": [0.8, 0.7],
    }


def test_no_images_give_an_empty_table_with_its_columns():
    table = build_predictions(pd.Series([], dtype="str"), np.zeros(0, np.int64), np.zeros((0, 2)), ["cat", "dog"])
    assert list(table.columns) == ["image_id", "label", "predicted", "probability_cat", "probability_dog"]
    assert table.empty
