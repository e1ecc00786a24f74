import numpy as np

from loupe.evaluation.explanation import find_confused_pairs, find_most_uncertain, find_most_wrong

PROBABILITIES = np.array(
    [
        [0.8, 0.1, 0.1],
        [0.5, 0.4, 0.1],
        [0.1, 0.2, 0.7],
        [0.3, 0.3, 0.4],
        [0.1, 0.9, 0.0],
    ]
)


def test_the_most_wrong_are_errors_alone_the_least_likely_truth_first():
    targets = np.array([0, 1, 0, 0, 2])
    assert find_most_wrong(targets, PROBABILITIES, 9).tolist() == [4, 2, 3, 1]
    assert find_most_wrong(targets, PROBABILITIES, 2).tolist() == [4, 2]


def test_nothing_is_most_wrong_where_all_is_right():
    assert find_most_wrong(PROBABILITIES.argmax(axis=1), PROBABILITIES, 9).tolist() == []


def test_the_most_uncertain_have_the_two_likeliest_labels_closest():
    assert find_most_uncertain(PROBABILITIES, 2).tolist() == [1, 3]


def test_ties_keep_the_order_of_the_images():
    even = np.full((3, 2), 0.5)
    assert find_most_uncertain(even, 3).tolist() == [0, 1, 2]
    assert find_most_wrong(np.ones(3, np.int64), even, 3).tolist() == [0, 1, 2]


def test_confused_pairs_count_both_directions_and_show_the_surest_errors_first():
    predicted = np.array([1, 1, 0, 2, 0, 0, 2])
    confidence = np.array([0.6, 0.9, 0.7, 0.8, 0.5, 0.9, 0.9])
    probabilities = np.full((7, 3), 0.0) + ((1 - confidence) / 2)[:, None]
    probabilities[np.arange(7), predicted] = confidence
    targets = np.array([0, 0, 1, 1, 1, 0, 2])
    first, second = find_confused_pairs(targets, probabilities, 5)
    assert (first.first, first.second) == (0, 1)
    assert first.first_as_second.tolist() == [1, 0]
    assert first.second_as_first.tolist() == [2, 4]
    assert (second.first, second.second) == (1, 2)
    assert second.first_as_second.tolist() == [3]
    assert second.second_as_first.tolist() == []


def test_the_label_that_is_taken_for_the_other_more_often_stands_first():
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
    (pair,) = find_confused_pairs(np.array([1, 1, 0]), probabilities, 5)
    assert (pair.first, pair.second) == (1, 0)
    assert pair.first_as_second.tolist() == [0, 1]


def test_only_as_many_pairs_as_asked_for_the_most_confused_first():
    targets = np.array([0, 1, 1, 2])
    probabilities = np.eye(3)[[1, 2, 2, 0]]
    pairs = find_confused_pairs(targets, probabilities, 1)
    assert [(pair.first, pair.second) for pair in pairs] == [(1, 2)]


def test_there_are_no_confused_pairs_where_all_is_right():
    assert find_confused_pairs(np.array([0, 1]), np.eye(2), 5) == []
