"""All figures of one test of a detector together, and which of its images are shown."""

import hashlib
import json
import math

import numpy as np
import pytest
from scipy.stats import binom

from loupe.evaluation.detection import (
    Pixels,
    Scored,
    choose_fixed_sample,
    find_worst_false_alarms,
    find_worst_misses,
    judge_detector,
)
from loupe.evaluation.thresholds import explain_threshold

INTERVALS = ["image_auroc", "image_average_precision", "false_alarm_rate", "miss_rate"]
CALIBRATION = np.random.default_rng(9).normal(size=49)


def score(seed=0, labels=("good", "good", "dent", "a/crack"), num_images=60):
    generator = np.random.default_rng(seed)
    names = [labels[row % len(labels)] for row in range(num_images)]
    return Scored(names, generator.normal(size=num_images) + [name != "good" for name in names], "good")


def draw_pixels(num_images=6):
    masks = np.zeros((num_images, 8, 8), np.uint8)
    masks[::2, 2:4, 2:5] = 1
    maps = np.random.default_rng(0).random((num_images, 8, 8)) + 0.5 * masks
    return Pixels(masks, maps.astype(np.float32))


def judge(test, pixels=None, rate=0.1):
    return judge_detector(test, explain_threshold(CALIBRATION, rate), pixels, seed=0)


def test_metrics_have_flat_names_with_intervals_and_kinds():
    metrics = judge(score(), draw_pixels()).to_metrics()
    for name in [*INTERVALS, "pixel_auroc"]:
        assert metrics[f"{name}_low"] <= metrics[name] <= metrics[f"{name}_high"]
    assert {"f1", "best_f1", "pixel_average_precision", "aupro"} <= set(metrics)
    kinds = {name for name in metrics if "/" in name}
    assert kinds == {
        f"{name}/{kind}" for name in ("image_auroc", "miss_rate", "num_images") for kind in ("dent", "a_crack")
    }
    assert metrics["f1"] <= metrics["best_f1"]
    assert (metrics["num_images"], metrics["num_anomalous"], metrics["num_images/dent"]) == (60, 30, 15)
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_without_masks_there_are_no_figures_over_pixels():
    judgement = judge(score())
    assert not [name for name in judgement.to_metrics() if "pixel" in name or "aupro" in name]
    assert judgement.num_pixel_images == 0


@pytest.mark.parametrize(
    ("test", "present"),
    [
        (score(labels=("good",)), {"false_alarm_rate", "num_images", "num_anomalous"}),
        (score(labels=("dent",)), {"miss_rate", "f1", "best_f1", "miss_rate/dent", "num_images/dent"}),
        (score(num_images=1), {"false_alarm_rate"}),
        (Scored(["good", "dent"], np.ones(2), "good"), {"image_auroc", "image_auroc/dent"}),
    ],
    ids=["normal alone", "anomalous alone", "one image", "all ties"],
)
def test_odd_test_sets_have_finite_figures_and_lack_what_is_not_defined(test, present):
    metrics = judge(test, draw_pixels()).to_metrics()
    assert present <= set(metrics)
    assert all(math.isfinite(value) for value in metrics.values())
    if len(set(test.labels)) == 1:
        assert not [name for name in metrics if name.startswith("image_")]


def test_rates_have_exact_intervals_which_have_a_width_where_no_image_errs():
    scores = np.concatenate([np.zeros(16), np.full(10, 9.0)])
    intervals = judge(Scored(["good"] * 16 + ["dent"] * 10, scores, "good")).intervals
    assert intervals["false_alarm_rate"] == pytest.approx((0, 1 - 0.025 ** (1 / 16)))
    assert intervals["miss_rate"] == pytest.approx((0, 1 - 0.025 ** (1 / 10)))
    low, high = judge(Scored(["good"] * 16, np.repeat([0.0, 9.0], [13, 3]), "good")).intervals["false_alarm_rate"]
    assert binom.sf(2, 16, low) == pytest.approx(0.025)
    assert binom.cdf(3, 16, high) == pytest.approx(0.025)


def test_more_false_alarms_than_promised_are_unlikely():
    promised = judge(Scored(["good"] * 100, np.random.default_rng(1).normal(size=100), "good"))
    shifted = judge(Scored(["good"] * 100, np.random.default_rng(1).normal(size=100) + 2, "good"))
    assert promised.chance_of_alarms > 0.05
    assert shifted.chance_of_alarms < 0.001
    assert judge(score(labels=("dent",))).chance_of_alarms is None


def test_the_chance_of_false_alarms_is_how_often_so_many_occur():
    generator, num_new = np.random.default_rng(0), 20
    drawn = generator.random((20_000, 19 + num_new))
    flagged = (drawn[:, 19:] > np.sort(drawn[:, :19], axis=1)[:, [-2]]).sum(axis=1)
    threshold = explain_threshold(drawn[0, :19], 0.1)
    for number in (0, 1, 4, 8):
        assert threshold.compute_chance(number, num_new) == pytest.approx(np.mean(flagged >= number), abs=0.012)


def test_the_worst_are_the_least_anomalous_defects_and_the_most_anomalous_normal_images():
    labels = ["good", "dent", "good", "dent", "good"]
    test = Scored(labels, np.array([0.1, 0.2, 0.9, 0.3, 0.5]), "good")
    assert find_worst_misses(test, 5).tolist() == [1, 3]
    assert find_worst_false_alarms(test, 2).tolist() == [2, 4]
    assert find_worst_misses(Scored(["good"], np.zeros(1), "good"), 5).tolist() == []


def name(number):
    return hashlib.sha256(bytes([number])).hexdigest()


def test_the_fixed_sample_takes_labels_in_turn_and_images_by_their_hashes():
    ids, labels = [name(number) for number in range(9)], ["good"] * 5 + ["dent"] * 3 + ["crack"]
    chosen = choose_fixed_sample(ids, labels, 6)
    assert [labels[position] for position in chosen] == ["crack", "dent", "good", "dent", "good", "dent"]
    dents = [ids[position] for position in chosen if labels[position] == "dent"]
    assert dents == sorted(ids[5:8])


def test_the_fixed_sample_stays_in_whatever_order_images_come_and_when_others_are_added():
    ids, labels = [name(number) for number in range(20)], ["good", "dent"] * 10
    chosen = {ids[position] for position in choose_fixed_sample(ids, labels, 8)}
    backwards = {ids[::-1][position] for position in choose_fixed_sample(ids[::-1], labels[::-1], 8)}
    assert backwards == chosen
    fewer = [position for position in range(20) if ids[position] in chosen or position % 3]
    assert {
        [ids[one] for one in fewer][position]
        for position in choose_fixed_sample([ids[one] for one in fewer], [labels[one] for one in fewer], 8)
    } == chosen


def test_a_sample_of_more_than_there_are_is_all_of_them():
    assert sorted(choose_fixed_sample(["b", "a"], ["good", "good"], 9).tolist()) == [0, 1]
