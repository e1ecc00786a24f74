import numpy as np
import pytest
from PIL import Image

from loupe.data.sheets import CAPTION, GAP, TILE, WIDE_TILE, draw_captioned, draw_rows


@pytest.mark.parametrize("channels", [1, 3])
def test_rows_have_the_first_picture_at_the_left_of_a_gap(draw, channels):
    image = np.asarray(draw(0, (32, 32)))
    blank = np.full((28, 28, channels), 7, np.uint8)
    sheet = draw_rows([[image[:28, :28, :channels]] * 4, [blank, *[255 - blank] * 3]])
    step = TILE + GAP
    assert sheet.size == (4 * step + 2 * GAP, 2 * step + GAP)
    assert sheet.getpixel((GAP + 5, GAP + step + 5)) == (7, 7, 7)
    assert sheet.getpixel((2 * GAP + step + 5, GAP + step + 5)) == (248, 248, 248)


def test_captioned_pictures_fill_rows_of_the_given_length():
    colours = [(10, 0, 0), (20, 0, 0), (30, 0, 0)]
    sheet = draw_captioned([Image.new("RGB", (40, 40), colour) for colour in colours], ["a", "b", "c"], num_columns=2)
    width, height = WIDE_TILE + GAP, WIDE_TILE + CAPTION + GAP
    assert sheet.size == (2 * width + GAP, 2 * height + GAP)
    places = [(GAP, GAP), (GAP + width, GAP), (GAP, GAP + height)]
    assert [sheet.getpixel((left + 5, top + 5)) for left, top in places] == colours


def test_a_caption_stands_below_its_picture():
    sheet = np.asarray(draw_captioned([Image.new("RGB", (40, 40), "white")], ["cat/0.png\nflat"], num_columns=1))
    below = GAP + WIDE_TILE
    assert (sheet[:below] == 255).all()
    assert (sheet[below:] < 128).any()


@pytest.mark.parametrize(("size", "shown"), [((300, 1), (150, 1)), ((1, 300), (1, 150)), ((10, 5), (150, 75))])
def test_a_picture_is_shown_whole_and_keeps_its_aspect(size, shown):
    sheet = np.asarray(draw_captioned([Image.new("RGB", size, "black")], [""], num_columns=1))
    rows, columns = np.nonzero((sheet == 0).all(axis=2))
    assert (columns.max() - columns.min() + 1, rows.max() - rows.min() + 1) == shown


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_pictures_of_other_modes_are_shown_too(draw, mode):
    assert draw_captioned([draw(0, mode=mode)], ["cat/0.png"]).mode == "RGB"


def test_no_pictures_give_a_sheet_that_says_so():
    sheet = np.asarray(draw_captioned([], []))
    assert (sheet < 128).any()
