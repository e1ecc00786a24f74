import json

import numpy as np
import pytest
from PIL import Image

from loupe.data.images import Geometry, fit_image, open_image
from loupe.data.prepare import (
    FEATURES,
    PIXELS,
    _fit_mask,
    choose_classifier_geometry,
    choose_detector_geometry,
    load_prepared,
    prepare_images,
)
from loupe.errors import DataError


@pytest.fixture
def rows_of(tabulate):
    """Manifest rows of ten images of one size and mode."""

    def rows_of(width, height, mode="RGB"):
        return tabulate([(f"cat{n}", "cat", None) for n in range(10)], (width, height), mode)

    return rows_of


def for_classifier(rows, input_size=None, fit=None):
    return choose_classifier_geometry(rows, input_size, fit, 224, 0.875, "bicubic")


def test_28_pixels_stay_small_and_are_enlarged_for_a_classifier_on_its_device(rows_of):
    assert for_classifier(rows_of(28, 28, "L")) == Geometry(28, 28, 1, 28, 28, 64, 64, "crop", "bicubic")


def test_photos_of_500_pixels_get_the_backbones_own_size_and_crop(rows_of):
    assert for_classifier(rows_of(500, 500)) == Geometry(256, 256, 3, 224, 224, 224, 224, "crop", "bicubic")


def test_100_pixels_get_twice_their_side_rounded_up_to_the_stride(rows_of):
    assert for_classifier(rows_of(100, 100)) == Geometry(100, 100, 3, 100, 100, 224, 224, "crop", "bicubic")
    assert for_classifier(rows_of(60, 60)).input_height == 128


def test_photos_a_little_smaller_than_the_margin_are_enlarged_to_it(rows_of):
    assert for_classifier(rows_of(230, 230)) == for_classifier(rows_of(500, 500))


@pytest.mark.parametrize("size", [(500, 300), (300, 500)])
def test_elongated_photos_are_squashed_without_a_margin(rows_of, size):
    assert for_classifier(rows_of(*size)) == Geometry(224, 224, 3, 224, 224, 224, 224, "squash", "bicubic")


def test_the_median_decides_and_not_one_odd_image(rows_of):
    rows = rows_of(500, 500)
    rows.loc[0, ["width", "height"]] = (4000, 20)
    assert for_classifier(rows) == for_classifier(rows_of(500, 500))


def test_a_size_and_a_fit_that_are_asked_for_are_taken(rows_of):
    geometry = for_classifier(rows_of(500, 300), input_size=(96, 96), fit="crop")
    assert geometry == Geometry(110, 110, 3, 96, 96, 96, 96, "crop", "bicubic")


def test_28_pixels_are_rebuilt_at_32(rows_of):
    geometry = choose_detector_geometry(rows_of(28, 28, "L"), PIXELS, None, None)
    assert geometry == Geometry(28, 28, 1, 28, 28, 32, 32, "squash", "bilinear")


def test_500_pixels_are_rebuilt_at_128_and_keep_their_borders(rows_of):
    geometry = choose_detector_geometry(rows_of(500, 500), PIXELS, None, None)
    assert geometry == Geometry(128, 128, 3, 128, 128, 128, 128, "squash", "bilinear")


def test_features_of_small_images_are_taken_at_twice_their_side(rows_of):
    geometry = choose_detector_geometry(rows_of(100, 100), FEATURES, None, None)
    assert geometry == Geometry(100, 100, 3, 100, 100, 192, 192, "squash", "bilinear")


@pytest.mark.parametrize("canvas", [PIXELS, FEATURES])
@pytest.mark.parametrize("size", [(8, 8), (28, 28), (33, 65), (127, 64), (500, 500), (640, 480), (3000, 300)])
def test_a_detectors_own_choice_keeps_to_its_canvas_and_nearly_to_the_shape(rows_of, canvas, size):
    geometry = choose_detector_geometry(rows_of(*size), canvas, None, None)
    seen = geometry.input_width, geometry.input_height
    assert all(side % canvas.multiple == 0 and side >= canvas.smallest for side in seen)
    assert seen[0] * seen[1] <= 1.25 * canvas.largest**2
    if min(seen) > canvas.smallest:
        assert 0.75 < (seen[0] / seen[1]) / (size[0] / size[1]) < 1.35


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("1", 1), ("LA", 1), ("I;16", 1), ("RGB", 3), ("P", 3)])
def test_grey_modes_need_one_channel(rows_of, mode, channels):
    assert choose_detector_geometry(rows_of(28, 28, mode), PIXELS, None, None).channels == channels


@pytest.mark.parametrize(("bits", "expected"), [([None] * 10, 16), ([None] * 8 + [10, 12], 12)])
def test_the_deepest_file_says_how_many_bits_hold_values(rows_of, bits, expected):
    assert choose_detector_geometry(rows_of(28, 28, "I;16").assign(bits=bits), PIXELS, None, None).bits == expected


@pytest.mark.parametrize("side", [200, 500, 1500])
def test_a_single_marked_pixel_is_kept_however_much_a_mask_shrinks(tmp_path, side):
    values = np.zeros((side, side), np.uint8)
    values[side // 3, side // 2] = 255
    Image.fromarray(values).save(tmp_path / "mask.png")
    geometry = Geometry(20, 20, 3, 20, 20, 32, 32, "squash", "bilinear")
    assert 0 < _fit_mask(tmp_path / "mask.png", geometry).sum() <= 9


def test_one_image_in_colour_asks_for_three_channels(rows_of):
    rows = rows_of(28, 28, "L")
    rows.loc[3, "mode"] = "RGB"
    assert choose_detector_geometry(rows, PIXELS, None, None).channels == 3


@pytest.fixture
def bolts(mvtec, read, divide):
    """Manifest rows with their splits."""
    manifest = read(mvtec)[0]
    return manifest.merge(divide(manifest), on="image_id")


GEOMETRY = Geometry(20, 24, 3, 20, 24, 32, 32, "squash", "bilinear")


def test_row_i_of_the_images_is_row_i_of_the_index(bolts, mvtec, tmp_path):
    prepare_images(mvtec, bolts.sample(frac=1, random_state=0), GEOMETRY, tmp_path / "prepared")
    prepared = load_prepared(tmp_path / "prepared")
    assert list(prepared.index["image_id"]) == sorted(bolts["image_id"])
    assert prepared.images.shape == (16, 20, 24, 3)
    for row, path in enumerate(prepared.index["path"]):
        np.testing.assert_array_equal(prepared.images[row], fit_image(open_image(mvtec / path), GEOMETRY))


def test_labels_and_splits_stay_with_their_images(bolts, mvtec, tmp_path):
    prepare_images(mvtec, bolts, GEOMETRY, tmp_path / "prepared")
    index = load_prepared(tmp_path / "prepared").index.set_index("path")
    expected = bolts.set_index("path").loc[index.index]
    assert list(index["label"]) == list(expected["label"])
    assert list(index["split"]) == list(expected["split"])


def test_a_mask_is_found_by_its_row_and_is_one_where_anomalous(bolts, mvtec, tmp_path):
    prepare_images(mvtec, bolts, GEOMETRY, tmp_path / "prepared")
    prepared = load_prepared(tmp_path / "prepared")
    rows = prepared.index.set_index("path")["mask_row"]
    for number in range(3):
        mask = np.asarray(Image.open(mvtec / "ground_truth" / "scratch" / f"{number}_mask.png"))
        np.testing.assert_array_equal(prepared.masks[rows[f"test/scratch/{number}.png"]], mask // 255)
    assert (rows[~rows.index.str.contains("scratch")] == -1).all()
    assert sorted(rows[rows >= 0]) == [0, 1, 2]


@pytest.mark.parametrize(("value", "depth"), [(255, np.uint8), (1, np.uint8), (1, np.uint16)])
def test_a_defect_thinner_than_a_pixel_is_kept_whatever_marks_it(tmp_path, tabulate, value, depth):
    line = np.zeros((200, 200), depth)
    line[101, 20:180] = value
    Image.fromarray(line).save(tmp_path / "mask.png")
    Image.fromarray(line.astype(np.uint8)).save(tmp_path / "0000_line.png")
    rows = tabulate([("line", "scratch", "test")]).assign(mask_path="mask.png", split="test")
    geometry = Geometry(20, 20, 1, 20, 20, 32, 32, "squash", "nearest")
    prepare_images(tmp_path, rows, geometry, tmp_path / "prepared")
    assert load_prepared(tmp_path / "prepared").masks[0, 10, 3:17].all()


def test_without_masks_there_is_an_empty_array(class_folders, read, tmp_path):
    manifest = read(class_folders)[0]
    prepare_images(class_folders, manifest.assign(split="train"), GEOMETRY, tmp_path / "prepared")
    prepared = load_prepared(tmp_path / "prepared")
    assert prepared.masks.shape == (0, 20, 24)
    assert (prepared.index["mask_row"] == -1).all()


def test_rows_of_a_split_are_positions(bolts, mvtec, tmp_path):
    prepare_images(mvtec, bolts, GEOMETRY, tmp_path / "prepared")
    prepared = load_prepared(tmp_path / "prepared")
    assert set(prepared.index["split"].iloc[prepared.rows_of("test")]) == {"test"}
    assert len(prepared.rows_of("test")) == 8
    assert len(prepared.rows_of("nowhere")) == 0


def test_the_geometry_is_written_beside_the_arrays_and_nothing_unfinished_stays(bolts, mvtec, tmp_path):
    prepare_images(mvtec, bolts, GEOMETRY, tmp_path / "prepared")
    assert Geometry(**json.loads((tmp_path / "prepared" / "geometry.json").read_text())) == GEOMETRY
    names = sorted(path.name for path in (tmp_path / "prepared").iterdir())
    assert names == ["geometry.json", "images.npy", "index.parquet", "masks.npy"]


def test_preparing_twice_writes_the_same_bytes(bolts, mvtec, tmp_path):
    prepare_images(mvtec, bolts, GEOMETRY, tmp_path / "first")
    prepare_images(mvtec, bolts[::-1], GEOMETRY, tmp_path / "second")
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()


def test_an_image_that_broke_since_it_was_listed_is_a_data_error(bolts, mvtec, tmp_path):
    (mvtec / "train" / "good" / "0.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"0\.png can't be decoded"):
        prepare_images(mvtec, bolts, GEOMETRY, tmp_path / "prepared")


def test_padding_keeps_all_of_the_image_and_its_aspect():
    geometry = Geometry(32, 32, 1, 32, 32, 32, 32, "pad", "nearest")
    fitted = fit_image(Image.new("L", (64, 16), 200), geometry)[:, :, 0]
    assert (fitted[12:20] == 200).all()
    assert (fitted[:12] == 0).all()
    assert (fitted[20:] == 0).all()


def test_an_input_may_be_wider_than_high(rows_of):
    geometry = for_classifier(rows_of(800, 600), (96, 160))
    assert (geometry.input_height, geometry.input_width) == (96, 160)
    assert (geometry.crop_height, geometry.crop_width) == (96, 160)
    assert (geometry.height, geometry.width) == (110, 183)
