import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from loupe.evaluation.pictures import draw_confusion, draw_heat_maps, draw_history, draw_predictions, draw_scores


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


@pytest.mark.parametrize(("num_images", "num_axes"), [(1, 8), (8, 8), (9, 16)])
def test_predictions_fill_a_grid_row_by_row(num_images, num_axes):
    images = np.zeros((num_images, 8, 8, 3), np.uint8)
    figure = draw_predictions(images, [f"image {number}" for number in range(num_images)])
    assert len(figure.axes) == num_axes
    assert sum(len(axes.images) for axes in figure.axes) == num_images
    render(figure)


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
