import numpy as np
import pytest

from loupe.evaluation.anomaly import compute_anomaly_metrics, compute_image_auroc, compute_pixel_auroc


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
    assert metrics["false_alarm_rate"] == 0.25
    assert metrics["f1"] == 0
    assert np.isnan([metrics["image_auroc"], metrics["image_average_precision"], metrics["miss_rate"]]).all()


def test_anomalous_images_alone_have_a_miss_rate_and_no_ranking():
    metrics = compute_anomaly_metrics(np.ones(4, bool), np.array([0.1, 0.2, 0.3, 0.9]), 0.5)
    assert metrics["miss_rate"] == 0.75
    assert np.isnan([metrics["image_auroc"], metrics["image_average_precision"], metrics["false_alarm_rate"]]).all()


def test_no_images_have_no_auroc():
    assert np.isnan(compute_image_auroc(np.zeros(0, bool), np.zeros(0)))


def test_pixel_auroc_is_the_auroc_over_all_pixels():
    generator = np.random.default_rng(0)
    masks = (generator.random((3, 6, 5)) < 0.2).astype(np.uint8)
    maps = np.round(generator.random((3, 6, 5)) + 0.3 * masks, 1)
    expected = slow_auroc(masks.reshape(-1) > 0, maps.reshape(-1))
    assert compute_pixel_auroc(masks, maps) == pytest.approx(expected)


@pytest.mark.parametrize("value", [0, 1])
def test_pixels_of_one_kind_have_no_auroc(value):
    assert np.isnan(compute_pixel_auroc(np.full((2, 3, 3), value, np.uint8), np.zeros((2, 3, 3))))


def test_no_pixels_have_no_auroc():
    assert np.isnan(compute_pixel_auroc(np.zeros((0, 3, 3), np.uint8), np.zeros((0, 3, 3))))
