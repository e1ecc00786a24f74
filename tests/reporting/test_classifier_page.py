"""The page on a classifier, as it is made of one and as a browser shows it."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from loupe.data.images import Geometry
from loupe.data.prepare import Prepared
from loupe.evaluation.judgement import Answers, judge_classifier
from loupe.models.classifiers import ClassifierConfig, build_classifier, predict_probabilities
from loupe.reporting.page import save_page
from loupe.stages.classifier_explanation import explain_classifier
from loupe.stages.classifier_report import Report, describe_training, render_report, save_pictures

HOSTILE_LABEL = "<script>alert(1)<"
LONG_LABEL = "a label with a name that is much longer than any column"
LABELS = ["cat", HOSTILE_LABEL, LONG_LABEL, "owl"]
SIDE, NUM_IMAGES = 32, 40
PICTURES = {"confusion", "history", "reliability", "coverage", "most_wrong", "most_uncertain", "confused_pairs"}


def prepare(labels, channels, num_images):
    """Noise, three in four of which are test images."""
    images = np.random.default_rng(0).integers(0, 256, (num_images, SIDE, SIDE, channels), dtype=np.uint8)
    rows = range(num_images)
    index = pd.DataFrame(
        {
            "image_id": [f"{row:064x}" for row in rows],
            "label": [labels[row % len(labels)] for row in rows],
            "split": [("train", "test", "test", "test")[row // len(labels) % 4] for row in rows],
            "mask_row": -1,
            "path": [f"{row}\"><img src=x onerror=alert(2)>'.png" for row in rows],
        }
    )
    geometry = Geometry(SIDE, SIDE, channels, SIDE, SIDE, SIDE, SIDE, "crop", "bilinear")
    return Prepared(images, np.zeros((0, SIDE, SIDE), np.uint8), index, geometry)


def build_report(backbone, labels, channels=3, num_images=NUM_IMAGES, learnt=0, calibrates=True):
    """What the stage gathers of a random network; `learnt` is added to the logit of the true label."""
    torch.manual_seed(0)
    middle = (0.5,) * channels
    config = ClassifierConfig(backbone, labels, (SIDE, SIDE), (SIDE, SIDE), middle, middle, channels)
    classifier, prepared = build_classifier(config, "none").eval(), prepare(labels, channels, num_images)
    rows = prepared.rows_of("test")
    targets = np.array([labels.index(label) for label in prepared.index["label"].iloc[rows]])
    said = predict_probabilities(classifier, torch.from_numpy(prepared.images[rows]).permute(0, 3, 1, 2)).numpy()
    said = said * np.exp(learnt * np.eye(len(labels), dtype=np.float32)[targets])
    test = Answers(targets, said / said.sum(axis=1, keepdims=True))
    kept = slice(10) if calibrates else slice(0)
    return Report(
        name="pets & co",
        labels=labels,
        facts=describe_training(
            {"weights": "random", "recipe": "fine_tuned", "best_epoch": 1, "refitted": True, "learnt_from_val": True},
            config,
            prepared,
            0.5,
        ),
        history=pd.DataFrame(
            {"epoch": [0, 1], "train/loss": [2.0, 1.0], "val/loss": [2.0, 1.5], "val/accuracy": [0.2, 0.4]}
        ),
        judgement=judge_classifier(test, Answers(targets[kept], test.probabilities[kept]), 0),
        explanation=explain_classifier(classifier, prepared, rows, test, num_pictures=5),
    )


@pytest.fixture(scope="module")
def save(tmp_path_factory):
    """Writes pictures and page of a report; gives the page's path and the pictures'."""

    def save(report):
        folder = tmp_path_factory.mktemp("reports")
        pictures = save_pictures(report, folder)
        save_page(render_report(report, pictures), folder / "classifier.html")
        return folder / "classifier.html", pictures

    return save


@pytest.fixture(scope="module")
def faulty():
    return build_report("small_cnn", LABELS, learnt=0.02)


@pytest.fixture(scope="module")
def page(faulty, save):
    return save(faulty)[0]


def test_the_headline_figures_stand_with_their_intervals(faulty, page, show):
    shown, *_ = show(page)
    accuracy, interval = faulty.judgement.figures["accuracy"], faulty.judgement.intervals["accuracy"]
    first = shown.locator(".measures div").first
    assert first.locator("dd").inner_text() == f"{accuracy:.1%}"
    assert f"{interval.low:.1%} to {interval.high:.1%}" in first.inner_text()
    assert shown.locator(".measures .interval").count() == 4
    assert f"{accuracy:.1%}" in shown.locator(".verdict").inner_text()


def test_a_head_that_was_fitted_at_once_has_no_curves(faulty, page, save, show):
    fitted, pictures = save(replace(faulty, history=faulty.history[:1]))
    assert set(pictures) == set(save(faulty)[1]) - {"history"}
    curves = "svg[aria-label*='by epoch']"
    assert (show(page)[0].locator(curves).count(), show(fitted)[0].locator(curves).count()) == (2, 0)


def test_a_second_training_is_told_of(page, show):
    shown, *_ = show(page)
    text = shown.locator("body").inner_text()
    assert "then all epochs were trained again, on the images of val too" in text
    assert "to judge by, then to train on" in text


def test_every_picture_is_shown_and_has_a_text(page, show):
    shown, *_ = show(page)
    assert shown.locator("img").count() > 50
    assert shown.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0 && image.alt)")


def test_charts_are_drawn_and_named(page, show):
    shown, *_ = show(page)
    charts = shown.locator(".chart > svg")
    assert [chart.get_attribute("aria-label") for chart in charts.all()] == [
        "loss by epoch",
        "accuracy by epoch",
        "accuracy against confidence",
        "accuracy against coverage",
    ]
    assert all(chart.bounding_box()["height"] > 150 for chart in charts.all())


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_window(page, show, width, scheme):
    shown, *_ = show(page, width, scheme)
    assert shown.evaluate("document.documentElement.scrollWidth") == width


def test_the_page_asks_for_nothing_and_complains_of_nothing(page, show):
    _, requested, told = show(page)
    assert [url for url in requested if not url.startswith("data:")] == [page.as_uri()]
    assert told == []


def test_hostile_names_are_shown_as_text(page, show):
    shown, _, told = show(page)
    assert shown.locator("script, [onerror]").count() == 0
    assert HOSTILE_LABEL in [one.strip() for one in shown.locator(".labels tbody th").all_inner_texts()]
    assert shown.locator("h1").inner_text() == "pets & co"
    assert told == []


def test_the_confusion_is_a_table_with_a_row_and_a_column_a_label(faulty, page, show):
    shown, *_ = show(page)
    rows = shown.locator(".confusion tbody tr").all()
    assert [row.locator("th").get_attribute("title") for row in rows] == LABELS
    cells = [[int(cell or 0) for cell in row.locator("td:not(.total)").all_inner_texts()] for row in rows]
    assert cells == faulty.judgement.confusion.tolist()
    for row, row_shown in enumerate(rows):
        for column, cell in enumerate(row_shown.locator("td:not(.total)").all()):
            expected = None if not cells[row][column] else "hit" if row == column else "miss"
            assert cell.get_attribute("class") == expected


def test_errors_stand_beside_where_the_network_looked(faulty, page, show):
    shown, *_ = show(page)
    cards = shown.locator("#wrong .pair").all()
    assert len(cards) == len(faulty.explanation.most_wrong) == 5
    left, right = (picture.bounding_box() for picture in cards[0].locator("img").all())
    assert left["y"] == right["y"]
    assert left["width"] == right["width"]
    assert "taken for" in cards[0].inner_text()
    assert "5 × 5 places" in shown.locator("#wrong").inner_text()


def test_confused_pairs_have_counts_and_examples(faulty, page, show):
    shown, *_ = show(page)
    sides = [side for pair in faulty.explanation.pairs for side in pair]
    assert [int(text) for text in shown.locator(".side p strong").all_inner_texts()] == [side.number for side in sides]
    errors = faulty.judgement.confusion.sum() - faulty.judgement.confusion.trace()
    assert sum(side.number for side in sides) == errors


def test_filters_and_responses_are_there_one_for_each_other(page, show):
    shown, *_ = show(page)
    tiles = [one.locator("img").count() for one in shown.locator("#filters .tiles").all()]
    assert tiles == [32, 32]


def test_what_the_page_links_to_stands_beside_it(page):
    links = {link for link in re.findall(r'href="([^"]+)"', page.read_text(encoding="utf-8")) if link[0] != "#"}
    assert links == {"data:,", "metrics/classifier.json", "classifier/predictions.parquet", "data.html"}


def test_sections_that_the_page_points_to_are_there(page):
    text = page.read_text(encoding="utf-8")
    assert all(f'id="{name}"' in text for name in re.findall(r'href="#([^"]+)"', text))


def test_the_same_pictures_are_files(faulty, save):
    _, pictures = save(faulty)
    assert set(pictures) == PICTURES | {"filters", "responses"}
    assert all(path.stat().st_size > 0 for path in pictures.values())


def test_a_dense_network_is_told_to_have_no_map_and_has_no_filters(save):
    page, pictures = save(build_report("dense_network", ["cat", "dog"], channels=1))
    text = page.read_text(encoding="utf-8")
    assert set(pictures) == PICTURES
    assert "keeps no map of the image" in text
    assert 'id="filters"' not in text


def test_where_nothing_is_wrong_the_page_says_so_and_does_not_boast(save):
    page, pictures = save(build_report("dense_network", ["cat", "dog"], learnt=50))
    text = page.read_text(encoding="utf-8")
    assert "No test image is classified wrongly." in text
    assert "still allows up to" in text
    assert "most errors between them" not in text
    assert set(pictures) == PICTURES


def test_a_classifier_no_better_than_the_commonest_label_is_a_warning(save):
    text = save(build_report("dense_network", ["cat", "dog"]))[0].read_text(encoding="utf-8")
    assert 'class="verdict warning"' in text
    assert "not clearly worse" in text


def test_without_calibration_images_the_page_says_so(save):
    text = save(build_report("dense_network", ["cat", "dog"], calibrates=False))[0].read_text(encoding="utf-8")
    assert "no calibration images" in text
    assert "temperature scaled" not in text


def test_of_many_labels_the_confusion_is_a_picture(save, show):
    labels = [f"label {number}" for number in range(70)]
    page, _ = save(build_report("dense_network", labels, num_images=280))
    shown, *_ = show(page, 400)
    assert shown.locator(".confusion").count() == 0
    assert shown.locator("#confusion img.whole").evaluate("image => image.naturalWidth") > 500
    assert shown.locator(".labels tbody tr").count() == 60
    assert "10 more labels" in shown.locator("#labels").inner_text()
    assert shown.evaluate("document.documentElement.scrollWidth") == 400
