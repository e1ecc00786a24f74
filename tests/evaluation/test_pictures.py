import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from loupe.evaluation.calibration import compute_coverage, compute_reliability
from loupe.evaluation.pictures import (
    HEAT_SIDE,
    draw_confusion,
    draw_coverage,
    draw_heat_maps,
    draw_history,
    draw_reliability,
    draw_scores,
    overlay_heat,
)


def render(figure):
    """Draw it in earnest: a figure may well be made and then fail to be drawn."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return np.asarray(Image.open(file).convert("RGB"))


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_the_confusion_shows_counts_and_names():
    figure = draw_confusion(np.array([[5, 1], [0, 3]]), ["cat", "dog"])
    axes = figure.axes[0]
    assert sorted(texts(axes)) == ["1", "3", "5"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog"]
    assert render(figure).std() > 0


def test_the_confusion_is_shaded_by_the_part_of_a_row():
    shades = draw_confusion(np.array([[3, 1], [0, 8]]), ["cat", "dog"]).axes[0].images[0].get_array()
    np.testing.assert_allclose(shades, [[0.75, 0.25], [0, 1]])


def test_a_label_without_images_stays_white():
    shades = draw_confusion(np.array([[0, 0], [0, 2]]), ["cat", "dog"]).axes[0].images[0].get_array()
    np.testing.assert_allclose(shades, [[0, 0], [0, 1]])


def test_many_labels_are_drawn_without_numbers():
    figure = draw_confusion(np.eye(31, dtype=np.int64), [str(number) for number in range(31)])
    assert texts(figure.axes[0]) == []


def test_a_thousand_labels_are_drawn_no_larger_than_a_hundred():
    hundred, thousand = (
        draw_confusion(np.eye(number, dtype=np.int64), [str(label) for label in range(number)])
        for number in (100, 1000)
    )
    assert thousand.get_size_inches().tolist() == hundred.get_size_inches().tolist()
    assert render(thousand).std() > 0


def test_a_label_is_shown_as_it_is_written_and_not_as_a_formula():
    render(draw_confusion(np.eye(2, dtype=np.int64), ["$_$", "over_100"]))


def test_scores_are_counted_by_kind_beside_the_threshold():
    figure = draw_scores(np.array([0.1, 0.2, 0.9]), ["good", "good", "dent"], "good", 0.5)
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert sorted(legend) == ["anomalous (1)", "normal (2)", "threshold 0.5"]
    assert render(figure).std() > 0


def test_each_kind_has_the_same_weight_however_many_its_images():
    scores = np.random.default_rng(0).random(100)
    figure = draw_scores(scores, ["good"] * 90 + ["dent"] * 10, "good", 0.5)
    heights = [sum(bar.get_height() for bar in bars) for bars in figure.axes[0].containers]
    assert heights == pytest.approx([1, 1])


@pytest.mark.parametrize("labels", [["good"] * 3, ["dent"] * 3])
def test_equal_scores_of_one_kind_can_be_drawn(labels):
    render(draw_scores(np.full(3, 0.2), labels, "good", 0.2))


@pytest.mark.parametrize("channels", [1, 3])
def test_heat_maps_share_one_scale(channels):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (3, 8, 8, channels), dtype=np.uint8)
    maps = generator.random((3, 8, 8)) * np.array([0.1, 1.0, 5.0])[:, None, None]
    figure = draw_heat_maps(images, images / 255, maps, ["a", "b", "c"])
    assert len({axes.images[0].get_clim() for axes in figure.axes[6:]}) == 1
    assert [axes.get_title() for axes in figure.axes[:3]] == ["a", "b", "c"]
    assert render(figure).std() > 0


def test_reconstructions_may_be_larger_than_the_images_they_are_of():
    images, rebuilt, maps = np.zeros((2, 28, 28, 1), np.uint8), np.zeros((2, 32, 32, 1)), np.ones((2, 28, 28))
    render(draw_heat_maps(images, rebuilt, maps, ["a", "b"]))


def test_a_perfect_reconstruction_can_be_drawn():
    render(draw_heat_maps(np.zeros((1, 8, 8, 1), np.uint8), np.zeros((1, 8, 8, 1)), np.zeros((1, 8, 8)), ["a"]))


def history(**columns):
    return pd.DataFrame({"epoch": [0, 1, 2], "train/loss": [3.0, 2.0, 1.0], "val/loss": [3.0, 1.5, 2.0], **columns})


def test_the_history_marks_the_best_epoch_by_val_loss():
    axes = draw_history(history()).axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert sorted(lines) == ["best epoch", "train/loss", "val/loss"]
    assert list(lines["best epoch"].get_xdata()) == [1, 1]


def test_the_history_shows_accuracy_where_there_is_one():
    assert len(draw_history(history()).axes) == 1
    figure = draw_history(history(**{"val/accuracy": [0.3, 0.5, 0.6]}))
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "accuracy"]
    render(figure)


def test_a_history_of_one_epoch_can_be_drawn():
    render(draw_history(history()[:1]))


def test_reliability_has_a_line_a_diagram_beside_the_ideal():
    diagram = compute_reliability(np.array([0, 1, 1]), np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]))
    figure = draw_reliability({"before": diagram, "after": diagram})
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["as sure as it is right", "before", "after"]
    assert render(figure).std() > 0


@pytest.mark.parametrize("num_images", [1, 100])
def test_coverage_is_drawn_of_any_number_of_images(num_images):
    confidence = np.linspace(0.6, 1, num_images)
    figure = draw_coverage(compute_coverage(np.zeros(num_images, np.int64), np.stack([confidence, 1 - confidence], 1)))
    assert len(figure.axes[0].lines[0].get_xdata()) == num_images
    render(figure)


@pytest.mark.parametrize(("side", "shown"), [(28, 6 * 28), (HEAT_SIDE, HEAT_SIDE), (300, 300)])
@pytest.mark.parametrize("channels", [1, 3])
def test_heat_lies_over_a_grey_copy_of_the_image(side, shown, channels):
    image, heat = np.full((side, side, channels), 100, np.uint8), np.zeros((4, 4))
    heat[0, 0] = 1.0
    covered = overlay_heat(image, heat)
    assert covered.shape == (shown, shown, 3)
    assert covered[-1, -1].tolist() == [100, 100, 100]
    red, _, blue = covered[2, 2].astype(int)
    assert red > 180 > blue


def test_heat_of_another_shape_covers_the_whole_image():
    assert overlay_heat(np.zeros((40, 80, 3), np.uint8), np.ones((2, 5), np.float32)).shape == (80, 160, 3)


def test_heat_leaves_the_image_as_it_was():
    image = np.full((200, 200, 3), 7, np.uint8)
    overlay_heat(image, np.ones((2, 2)))
    assert (image == 7).all()
