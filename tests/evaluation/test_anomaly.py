import numpy as np
import pytest

from loupe.evaluation.anomaly import (
    compute_anomaly_metrics,
    compute_image_auroc,
    compute_kind_metrics,
    compute_resampled_metrics,
)


def sample(seed, ties=False):
    generator = np.random.default_rng(seed)
    is_anomalous = generator.random(40) < 0.4
    scores = generator.normal(size=40) + is_anomalous
    return is_anomalous, np.round(scores) if ties else scores


def slow_auroc(is_anomalous, scores):
    """Over all pairs, ties counting half."""
    wins = [
        1.0 if high > low else 0.5 if high == low else 0.0
        for high in scores[is_anomalous]
        for low in scores[~is_anomalous]
    ]
    return sum(wins) / len(wins)


def slow_average_precision(is_anomalous, scores):
    """Precision at each distinct threshold, weighted by the recall that it adds."""
    total, last = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        flagged = scores >= threshold
        recall = (flagged & is_anomalous).sum() / is_anomalous.sum()
        total += (recall - last) * (flagged & is_anomalous).sum() / flagged.sum()
        last = recall
    return total


def slow_f1(is_anomalous, scores, threshold):
    hits = sum(1 for truth, score in zip(is_anomalous, scores, strict=True) if truth and score > threshold)
    return 2 * hits / (int(is_anomalous.sum()) + sum(1 for score in scores if score > threshold))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_metrics_equal_their_definitions(seed, ties):
    is_anomalous, scores = sample(seed, ties)
    flagged = scores > 0.5
    assert compute_anomaly_metrics(is_anomalous, scores, 0.5) == pytest.approx(
        {
            "image_auroc": slow_auroc(is_anomalous, scores),
            "image_average_precision": slow_average_precision(is_anomalous, scores),
            "f1": slow_f1(is_anomalous, scores, 0.5),
            "best_f1": max(slow_f1(is_anomalous, scores, one) for one in {scores.min() - 1, *scores} - {scores.max()}),
            "false_alarm_rate": (flagged & ~is_anomalous).sum() / (~is_anomalous).sum(),
            "miss_rate": (~flagged & is_anomalous).sum() / is_anomalous.sum(),
        }
    )


def test_a_higher_score_is_more_anomalous():
    assert compute_image_auroc(np.array([False, False, True]), np.array([0.1, 0.2, 0.9])) == 1
    assert compute_image_auroc(np.array([False, False, True]), np.array([0.8, 0.9, 0.1])) == 0


def test_scores_that_are_all_equal_are_worth_a_coin():
    assert compute_image_auroc(np.array([False, True, True]), np.ones(3)) == 0.5


def test_a_score_at_the_threshold_is_not_flagged():
    metrics = compute_anomaly_metrics(np.array([False, True]), np.array([0.5, 0.5]), 0.5)
    assert (metrics["false_alarm_rate"], metrics["miss_rate"], metrics["f1"]) == (0, 1, 0)


def test_normal_images_alone_have_a_false_alarm_rate_and_no_ranking():
    metrics = compute_anomaly_metrics(np.zeros(4, bool), np.array([0.1, 0.2, 0.3, 0.9]), 0.5)
    assert {name: value for name, value in metrics.items() if not np.isnan(value)} == {"false_alarm_rate": 0.25}


def test_anomalous_images_alone_have_a_miss_rate_and_no_ranking():
    metrics = compute_anomaly_metrics(np.ones(4, bool), np.array([0.1, 0.2, 0.3, 0.9]), 0.5)
    assert metrics["miss_rate"] == 0.75
    assert metrics["best_f1"] == 1
    assert np.isnan([metrics["image_auroc"], metrics["image_average_precision"], metrics["false_alarm_rate"]]).all()


def test_no_images_have_no_auroc():
    assert np.isnan(compute_image_auroc(np.zeros(0, bool), np.zeros(0)))


def test_each_kind_is_ranked_against_all_normal_images_and_no_other_kind():
    generator = np.random.default_rng(0)
    labels = np.array(["good"] * 10 + ["dent"] * 6 + ["a crack"] * 4)
    scores = generator.normal(size=20).round(1) + (labels == "dent") + 2 * (labels == "a crack")
    table = compute_kind_metrics(list(labels), scores, 1.0, "good").set_index("kind")
    assert list(table.index) == ["a crack", "dent"]
    for kind, row in table.iterrows():
        chosen = (labels == kind) | (labels == "good")
        assert row["image_auroc"] == pytest.approx(slow_auroc(labels[chosen] == kind, scores[chosen]))
        assert row["num_images"] == (labels == kind).sum()
        assert row["miss_rate"] == np.mean(scores[labels == kind] <= 1.0)


def test_without_normal_images_a_kind_has_a_miss_rate_and_no_auroc():
    table = compute_kind_metrics(["dent", "dent"], np.array([0.1, 0.9]), 0.5, "good")
    assert np.isnan(table["image_auroc"]).all()
    assert list(table["miss_rate"]) == [0.5]


def test_without_defects_there_are_no_kinds():
    table = compute_kind_metrics(["good"], np.array([0.1]), 0.5, "good")
    assert len(table) == 0
    assert list(table) == ["kind", "num_images", "image_auroc", "miss_rate"]


@pytest.mark.parametrize("ties", [False, True])
def test_resampled_figures_are_those_of_the_images_that_a_resample_has(ties):
    is_anomalous, scores = sample(1, ties)
    weights = np.random.default_rng(0).multinomial(40, np.full(40, 1 / 40), 25)
    resampled = compute_resampled_metrics(is_anomalous, scores, weights.astype(np.float64))
    for row, times in enumerate(weights):
        expected = compute_anomaly_metrics(is_anomalous.repeat(times), scores.repeat(times), 0.5)
        assert {name: values[row] for name, values in resampled.items()} == pytest.approx(
            {name: expected[name] for name in resampled}
        )


def test_a_resample_with_one_kind_of_image_has_no_ranking():
    resampled = compute_resampled_metrics(
        np.array([False, True]), np.array([0.1, 0.9]), np.array([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    )
    assert np.isnan(resampled["image_auroc"]).tolist() == [True, True, False]
    assert np.isnan(resampled["image_average_precision"]).tolist() == [True, True, False]
