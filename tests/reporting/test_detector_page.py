"""The page on a detector, as it is made of one, and as a browser shows it and lets the threshold be moved."""

import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import f1_score

from loupe.data.images import Geometry
from loupe.data.prepare import Prepared
from loupe.evaluation.detection import Pixels, Scored, judge_detector
from loupe.evaluation.thresholds import compute_threshold, explain_threshold
from loupe.models.detectors.base import Detector
from loupe.reporting.page import save_page
from loupe.stages.detector_explanation import MOST_THUMBNAILS, compute_in_batches, explain_detector
from loupe.stages.detector_report import Report, describe_detector, render_report, save_pictures

HOSTILE_LABEL = "</script><script>alert(1)</script>"
LABELS = ("good", "good", "dent", HOSTILE_LABEL)
HEIGHT, WIDTH = 24, 40
CALIBRATION = np.random.default_rng(7).normal(100, 6, 39)
CONFIG = {"detector": "padim", "config": {"backbone": "resnet18"}, "weights": "package", "normal_label": "good"}
HISTORY = pd.DataFrame({"epoch": [0, 1], "train/loss": [2.0, 1.0], "val/loss": [2.0, 1.5]})


class Darkness(Detector):
    """The map is how dark each pixel is, the score its mean."""

    name, config_type = "darkness", dict
    white: torch.Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("white", torch.tensor(255.0))

    @classmethod
    def build(cls, config, weights):
        return cls()

    def forward(self, images):
        maps = self.white - images.float().mean(dim=1)
        return maps.mean(dim=(1, 2)), maps

    def embed(self, images):
        return images.float().mean(dim=(2, 3))


def prepare(labels, channels, num_images, has_masks):
    """Noisy grey images of uneven brightness, those of a defect with a dark square; all are test images but one."""
    generator = np.random.default_rng(0)
    names = [labels[row % len(labels)] for row in range(num_images)]
    is_defect = np.array([name != "good" for name in names])
    masks = np.zeros((num_images, HEIGHT, WIDTH), np.uint8)
    masks[is_defect, 6:14, 10:20] = 1
    grey = 155 + generator.normal(0, 6, (num_images, 1, 1)) + generator.normal(0, 8, masks.shape) - 100 * masks
    images = grey.clip(0, 255).astype(np.uint8)[..., None].repeat(channels, axis=3)
    index = pd.DataFrame(
        {
            "image_id": [f"{row * 7919 % num_images:064x}" for row in range(num_images)],
            "label": names,
            "split": ["train"] + ["test"] * (num_images - 1),
            "mask_row": np.where(is_defect & has_masks, is_defect.cumsum() - 1, -1),
            "path": [f"{row}\"><img src=x onerror=alert(2)>'.png" for row in range(num_images)],
        }
    )
    geometry = Geometry(HEIGHT, WIDTH, channels, HEIGHT, WIDTH, HEIGHT, WIDTH, "squash", "bilinear")
    return Prepared(images, masks[is_defect] if has_masks else masks[:0], index, geometry)


def build_report(labels=LABELS, channels=1, num_images=101, has_masks=True, history=None):
    """What the stage gathers of a detector of darkness."""
    detector, prepared = Darkness(), prepare(labels, channels, num_images, has_masks)
    rows = prepared.rows_of("test")
    scores, maps = compute_in_batches(detector, prepared, rows, np.ones(len(rows), bool))
    test = Scored(list(prepared.index["label"].iloc[rows]), scores, "good")
    masks = np.zeros(maps.shape, np.uint8)
    masks[test.is_anomalous, 6:14, 10:20] = 1
    return Report(
        name="tiles & co",
        facts=describe_detector(CONFIG, prepared, 3),
        history=history,
        test=test,
        calibration_scores=CALIBRATION,
        judgement=judge_detector(
            test, explain_threshold(CALIBRATION, 0.1), Pixels(masks, maps) if has_masks else None, 0
        ),
        explanation=explain_detector(detector, prepared, rows, test, num_pictures=4),
    )


@pytest.fixture(scope="module")
def save(tmp_path_factory):
    """Writes pictures and page of a report; gives the page's path and the pictures'."""

    def save(report):
        folder = tmp_path_factory.mktemp("reports")
        pictures = save_pictures(report, folder)
        save_page(render_report(report), folder / "detector.html")
        return folder / "detector.html", pictures

    return save


@pytest.fixture(scope="module")
def report():
    return build_report(history=HISTORY)


@pytest.fixture(scope="module")
def page(report, save):
    return save(report)[0]


def read(shown, name):
    return shown.locator(f'[data-live="{name}"]').first.inner_text()


def move(shown, threshold):
    """As a hand moves the slider; gives the value that it comes to."""
    slider = shown.locator("#threshold")
    slider.evaluate("(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')) }", threshold)
    return float(slider.input_value())


def check_counts(shown, test, threshold):
    """Everything that the page says of a threshold is what numpy and scikit-learn say."""
    flagged, is_anomalous = test.scores > threshold, test.is_anomalous
    assert read(shown, "flagged") == str(flagged.sum())
    assert read(shown, "alarms") == str((flagged & ~is_anomalous).sum())
    assert read(shown, "misses") == str((~flagged & is_anomalous).sum())
    assert read(shown, "alarm-rate") == f"{flagged[~is_anomalous].mean():.1%}"
    assert read(shown, "miss-rate") == f"{(~flagged[is_anomalous]).mean():.1%}"
    assert float(read(shown, "f1")) == pytest.approx(f1_score(is_anomalous, flagged, zero_division=0), abs=6e-4)
    for kind in sorted(set(test.labels) - {"good"}):
        of_kind = np.array(test.labels) == kind
        row = shown.locator(".kinds tbody tr", has_text=kind)
        assert row.locator(".kind-flagged").inner_text() == str(flagged[of_kind].sum())
        assert row.locator(".kind-missed").inner_text() == str((~flagged)[of_kind].sum())
        assert row.locator(".kind-miss-rate").inner_text() == f"{(~flagged)[of_kind].mean():.1%}"
    assert shown.locator(".images figure.flagged").count() == flagged.sum()
    assert shown.locator(".images figure.erring").count() == (flagged != is_anomalous).sum()


def test_the_page_starts_at_the_chosen_threshold(report, page, show):
    shown, *_ = show(page)
    check_counts(shown, report.test, report.judgement.threshold.value)
    assert float(shown.locator("#threshold").input_value()) == pytest.approx(report.judgement.threshold.value)
    assert read(shown, "alarm-rate") == f"{report.judgement.figures['false_alarm_rate']:.1%}"
    assert read(shown, "miss-rate") == f"{report.judgement.figures['miss_rate']:.1%}"
    assert read(shown, "promise") == f"{report.judgement.threshold.rate:.1%}"


def test_moving_the_slider_changes_what_is_flagged_to_what_numpy_computes(report, page, show):
    shown, *_ = show(page)
    seen = set()
    for quantile in (0.05, 0.3, 0.5, 0.77, 0.95):
        check_counts(shown, report.test, move(shown, float(np.quantile(report.test.scores, quantile))))
        seen.add(read(shown, "flagged"))
    assert len(seen) == 5


def test_the_ends_of_the_slider_flag_all_and_nothing(report, page, show):
    shown, *_ = show(page)
    check_counts(shown, report.test, move(shown, -1e9))
    assert read(shown, "flagged") == str(len(report.test.scores))
    check_counts(shown, report.test, move(shown, 1e9))
    assert read(shown, "flagged") == "0"


def test_a_score_at_the_threshold_is_not_flagged(report, page, show):
    shown, *_ = show(page)
    threshold = float(np.sort(report.test.scores)[-10])
    shown.locator("#threshold-field").fill(repr(threshold))
    assert read(shown, "flagged") == "9"
    check_counts(shown, report.test, threshold)


@pytest.mark.parametrize("rate", [0.025, 0.05, 0.2, 0.5])
def test_a_rate_that_is_asked_for_gives_the_threshold_of_the_calibration_images(report, page, show, rate):
    shown, *_ = show(page)
    shown.locator("#rate-field").fill(f"{100 * rate:g}")
    threshold = compute_threshold(CALIBRATION, rate)
    check_counts(shown, report.test, threshold)
    assert float(shown.locator("#threshold-field").input_value()) == pytest.approx(threshold, rel=1e-5)
    assert read(shown, "promise") == f"{math.floor(40 * rate + 1e-9) / 40:.1%}"


def test_a_rate_that_can_not_be_promised_is_said_to_be_none(report, page, show):
    shown, *_ = show(page)
    shown.locator("#rate-field").fill("1")
    assert read(shown, "promise") == "2.50%: no lower rate can be promised by 39 calibration images"
    check_counts(shown, report.test, CALIBRATION.max())


def test_the_button_brings_the_chosen_threshold_back(report, page, show):
    shown, *_ = show(page)
    move(shown, 1e9)
    shown.locator("#back").click()
    check_counts(shown, report.test, report.judgement.threshold.value)


def test_the_line_stands_where_the_axis_says(report, page, show):
    shown, *_ = show(page)

    def find_line():
        box = shown.locator("#line line").bounding_box()
        return box["x"] + box["width"] / 2

    ticks = {}
    for tick in shown.locator("#try .chart text:not(.axis-name)").all():
        box = tick.bounding_box()
        ticks[float(tick.text_content())] = box["x"] + box["width"] / 2
    assert len(ticks) >= 3
    for value, place in ticks.items():
        move(shown, value)
        assert find_line() == pytest.approx(place, abs=1.5)
    handle = shown.locator("#threshold").bounding_box()
    move(shown, -1e9)
    assert handle["x"] <= find_line() <= handle["x"] + 20


def test_images_are_sorted_by_score_and_can_be_narrowed_to_errors(report, page, show):
    shown, *_ = show(page)
    scores = [float(one.get_attribute("data-score")) for one in shown.locator(".images figure").all()]
    assert scores == sorted(report.test.scores.tolist(), reverse=True)
    shown.locator("#filter").select_option("erring")
    wrong = (report.test.scores > report.judgement.threshold.value) != report.test.is_anomalous
    assert shown.locator(".images figure:visible").count() == wrong.sum() > 0


def test_examples_say_what_becomes_of_them_as_the_threshold_moves(page, show):
    shown, *_ = show(page)
    move(shown, 1e9)
    assert set(shown.locator("#misses .outcome").all_inner_texts()) == {"missed"}
    assert set(shown.locator("#alarms .outcome").all_inner_texts()) == {"passed"}
    move(shown, -1e9)
    assert set(shown.locator("#misses .outcome").all_inner_texts()) == {"found"}
    assert set(shown.locator("#alarms .outcome").all_inner_texts()) == {"false alarm"}


def test_examples_show_original_map_overlay_and_mask_where_there_is_one(report, page, show):
    shown, *_ = show(page)
    for section, num_parts in (("#misses", 4), ("#alarms", 3)):
        cards = shown.locator(f"{section} .case").all()
        assert [card.locator("img").count() for card in cards] == [num_parts] * 4
    names = shown.locator("#misses .case").first.locator("div > span").all_inner_texts()
    assert names == ["original", "anomaly map", "overlay", "mask"]
    for section in ("#misses", "#alarms", "#sample"):
        assert report.explanation.scale.describe().lower() in shown.locator(section).inner_text().lower()


def test_the_headline_figures_stand_with_their_intervals(report, page, show):
    shown, *_ = show(page)
    auroc, interval = report.judgement.figures["image_auroc"], report.judgement.intervals["image_auroc"]
    first = shown.locator(".measures div").first
    assert first.locator("dd").inner_text() == f"{auroc:.3f}"
    assert f"{interval.low:.3f} to {interval.high:.3f}" in first.inner_text()
    assert shown.locator(".measures .interval").count() == 5
    assert report.judgement.threshold.describe() in shown.locator("#try").inner_text()


def test_every_picture_is_shown_and_has_a_text(page, show):
    shown, *_ = show(page)
    assert shown.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0 && image.alt)")


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_window(page, show, width, scheme):
    shown, *_ = show(page, width, scheme)
    assert shown.evaluate("document.documentElement.scrollWidth") == width


def test_the_page_asks_for_nothing_and_runs_no_script_but_its_own(page, show):
    shown, requested, told = show(page)
    assert [url for url in requested if not url.startswith("data:")] == [page.as_uri()]
    assert told == []
    shown.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'}))")
    assert shown.evaluate("window.ran") is None


def test_hostile_names_are_shown_as_text(page, show):
    shown, _, told = show(page)
    assert shown.locator("[onerror]").count() == 0
    assert shown.locator("script").count() == 2
    assert HOSTILE_LABEL in [one.strip() for one in shown.locator(".kinds tbody th").all_inner_texts()]
    assert told == []


def test_what_the_page_links_to_stands_beside_it_or_on_it(page):
    text = page.read_text(encoding="utf-8")
    links = set(re.findall(r'href="([^"]+)"', text))
    assert {link for link in links if link[0] != "#"} == {
        "data:,",
        "metrics/detector.json",
        "detector/scores.parquet",
        "data.html",
    }
    assert all(f'id="{link[1:]}"' in text for link in links if link[0] == "#")


def test_the_pictures_are_files_too(report, save):
    _, pictures = save(report)
    assert set(pictures) == {"scores", "heat_maps", "worst_misses", "worst_false_alarms", "history"}
    assert all(path.stat().st_size > 0 for path in pictures.values())


def test_training_in_epochs_has_a_chart_and_a_fit_in_closed_form_none(page, save):
    assert 'aria-label="loss by epoch"' in page.read_text(encoding="utf-8")
    other, pictures = save(build_report(num_images=21))
    assert 'aria-label="loss by epoch"' not in other.read_text(encoding="utf-8")
    assert "history" not in pictures


def test_without_defects_the_page_says_so_and_still_moves(save, show):
    report = build_report(labels=("good",), num_images=31, has_masks=False)
    shown, _, told = show(save(report)[0])
    assert "no anomalous test images" in shown.locator(".verdict.warning").inner_text()
    move(shown, float(np.median(report.test.scores)))
    assert read(shown, "alarms") == "15"
    assert (read(shown, "miss-rate"), read(shown, "f1")) == ("–", "–")
    assert shown.locator("#kinds, #misses").count() == 0
    assert told == []


def test_without_normal_images_there_are_misses_alone(save, show):
    shown, _, told = show(save(build_report(labels=("dent",), num_images=21))[0])
    move(shown, 1e9)
    assert (read(shown, "alarm-rate"), read(shown, "miss-rate")) == ("–", "100.0%")
    assert shown.locator("#alarms").count() == 0
    assert told == []


def test_without_masks_there_are_no_figures_over_pixels_and_no_masks(save, show):
    shown, *_ = show(save(build_report(num_images=21, has_masks=False, channels=3))[0])
    assert "pixel" not in shown.locator(".measures").inner_text()
    assert shown.locator("#misses .case").first.locator("img").count() == 3


def shift(report, by):
    """The same report of scores that all are higher."""
    test = Scored(report.test.labels, report.test.scores + by, "good")
    judgement = judge_detector(test, report.judgement.threshold, None, 0)
    return render_report(Report(**{**vars(report), "test": test, "judgement": judgement}))


def test_where_nothing_is_flagged_the_page_does_not_boast(report):
    text = shift(report, -200)
    assert "0.0% to 7.1%" in text  # none of 50 normal images
    assert "More defects are missed than found." in text


def test_more_false_alarms_than_promised_are_a_warning(report):
    text = shift(report, 40)
    assert 'class="verdict warning"' in text
    assert "unlike those of calibration" in text


def test_of_many_images_a_part_is_shown_with_all_that_are_pictured(save):
    report = build_report(num_images=401)
    shown = [one.path for one in report.explanation.thumbnails]
    assert len(set(shown)) == len(shown) == MOST_THUMBNAILS
    pictured = [*report.explanation.worst_misses, *report.explanation.worst_false_alarms]
    assert {one.path for one in pictured} <= set(shown)
    scores = np.array([one.score for one in report.explanation.thumbnails])
    assert (np.diff(scores) <= 0).all()
    np.testing.assert_allclose(np.median(scores), np.median(report.test.scores), rtol=0.02)
    assert "200 of the 400 test images" in save(report)[0].read_text(encoding="utf-8")


def test_facts_name_the_backbone_of_the_detector_of_tiles_too():
    prepared = prepare(("good",), 1, 3, has_masks=False)
    inner = {"backbone": "resnet34", "crop": [70, 80], "size": [64, 96]}
    grid = {"detector": "knn_patches", "inner": inner, "rows": 2, "columns": 3}
    facts = dict(describe_detector({**CONFIG, "detector": "tiled", "config": grid}, prepared, 0))
    assert (facts["backbone"], facts["detector"]) == ("resnet34", "knn patches")
    assert facts["tiles"] == "2 × 3, each of 70 × 80 pixels and looked at by itself"
    assert facts["what it sees"] == "64 × 96 pixels in 1 channel"
    facts = dict(describe_detector({**CONFIG, "config": {}, "weights": None, "best_epoch": 4}, prepared, 0))
    assert facts["best epoch"].startswith("4")
    assert not {"backbone", "its weights"} & set(facts)
    assert facts["seed"] == "0"
