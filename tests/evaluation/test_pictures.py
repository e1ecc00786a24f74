import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from loupe.evaluation.calibration import compute_coverage, compute_reliability
from loupe.evaluation.pictures import (
    HEAT_SIDE,
    DisplayScale,
    HeatMap,
    choose_display_scale,
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


def read_legend(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_scores_are_counted_by_kind_beside_the_threshold():
    figure = draw_scores(np.array([0.1, 0.2, 0.9, 0.8, 0.7]), ["good", "good", "dent", "_cr$c$k", "dent"], "good", 0.5)
    assert read_legend(figure) == ["2 good", "2 dent", "1 _cr$c$k", "threshold 0.5"]
    assert render(figure).std() > 0


def test_each_kind_has_the_same_weight_however_many_its_images():
    scores = np.random.default_rng(0).random(100)
    figure = draw_scores(scores, ["good"] * 90 + ["dent"] * 10, "good", 0.5)
    bars, outline = figure.axes[0].patches[:-1], figure.axes[0].patches[-1]
    assert sum(bar.get_height() for bar in bars) == pytest.approx(1)
    assert outline.get_xy()[1::2, 1].sum() == pytest.approx(1)


def test_the_rarest_of_many_kinds_are_drawn_as_one():
    labels = [f"kind {kind}" for kind in range(12) for _ in range(20 - kind)]
    legend = read_legend(draw_scores(np.arange(float(len(labels))), labels, "good", 0.5))
    assert legend[:3] == ["0 good", "20 kind 0", "19 kind 1"]
    assert legend[-2] == f"{sum(20 - kind for kind in range(7, 12))} of other kinds"
    assert len(legend) == 10


@pytest.mark.parametrize("labels", [["good"] * 3, ["dent"] * 3])
def test_equal_scores_of_one_kind_can_be_drawn(labels):
    render(draw_scores(np.full(3, 0.2), labels, "good", 0.2))


def show(channels, mask):
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (8, 12, channels), dtype=np.uint8)
    return HeatMap("a $tile$", image, generator.random((8, 12)), mask)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_stands_above_its_map_its_overlay_and_its_mask(channels):
    mask = np.zeros((8, 12), np.uint8)
    mask[2, 3] = 1
    figure = draw_heat_maps([show(channels, mask), show(channels, None)], DisplayScale(0.25, 4.0))
    assert [axes.get_ylabel() for axes in figure.axes[::2]] == ["original", "anomaly map", "overlay", "mask"]
    shown = figure.axes[6].images[0].get_array()
    assert shown[2, 3] == 255
    assert shown.sum() == 255
    assert [len(axes.images) for axes in figure.axes[6:]] == [1, 0]
    assert texts(figure.axes[7]) == ["no mask"]
    assert figure.get_supxlabel() == "display scale: 0 = 0.25, 1 = 4"
    assert render(figure).std() > 0


def test_where_no_image_has_a_mask_there_is_no_row_of_them():
    figure = draw_heat_maps([show(1, None)] * 2, DisplayScale(0.25, 4.0))
    assert [axes.get_ylabel() for axes in figure.axes[::2]] == ["original", "anomaly map", "overlay"]


def test_where_there_is_nothing_to_show_the_picture_says_so():
    figure = draw_heat_maps([], DisplayScale(0.0, 1.0))
    assert figure.get_supxlabel() == "there are no such images"
    render(figure)


def test_the_display_scale_is_common_to_all_maps_and_keeps_their_order():
    maps = np.random.default_rng(0).normal(size=(3, 8, 8)) * np.array([0.1, 1.0, 5.0])[:, None, None]
    scale = choose_display_scale(maps)
    assert scale.low == np.median(maps)
    shown = scale.apply(maps)
    assert (shown.min(), shown.max()) == (0, 1)
    order = np.argsort(maps.reshape(-1))
    assert (np.diff(shown.reshape(-1)[order]) >= 0).all()
    assert 0.004 < (shown == 1).mean() < 0.011


@pytest.mark.parametrize("maps", [np.full((2, 3, 3), 7.0), np.zeros((0, 3, 3))])
def test_maps_that_are_all_alike_and_no_maps_have_a_scale_too(maps):
    scale = choose_display_scale(maps)
    assert scale.high > scale.low
    assert (scale.apply(maps) == 0).all()


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
