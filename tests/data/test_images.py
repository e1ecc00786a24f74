import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from loupe.data.images import Geometry, choose_num_threads, decode_image, fit_image, open_image
from loupe.errors import DataError


def geometry(height, width, channels=3, fit="squash", interpolation="bilinear"):
    return Geometry(height, width, channels, height, width, height, width, fit, interpolation)


def encode(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_high_byte(kind):
    deep = np.array([[0, 255, 256], [0x8000, 0xABCD, 0xFFFF]], np.uint16)
    image = open_image(encode(Image.fromarray(deep), kind))
    assert image.mode == "L"
    assert np.asarray(image).tolist() == [[0, 0, 1], [0x80, 0xAB, 0xFF]]


@pytest.mark.parametrize(
    ("bits", "expected"), [(None, [0, 64, 255]), (12, [0, 64, 255]), (14, [0, 16, 63]), (10, [0, 255, 255])]
)
def test_of_sixteen_bits_as_many_are_looked_at_as_hold_values(bits, expected):
    deep = encode(Image.fromarray(np.array([[0, 1024, 4095]], np.uint16)), "PNG")
    assert np.asarray(open_image(deep, bits)).tolist() == [expected]
    assert decode_image(deep)[2] == 12
    assert decode_image(encode(Image.new("L", (3, 1)), "PNG"))[2] is None


@pytest.mark.parametrize("mode", ["F", "LAB"])
def test_pixels_without_a_known_black_and_white_are_refused(mode):
    with pytest.raises(DataError, match=f"its pixels are of the format {mode}; expected grey or colour"):
        open_image(encode(Image.new(mode, (4, 4)), "TIFF"))


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [(1, lambda a: a), (3, lambda a: np.rot90(a, 2)), (6, lambda a: np.rot90(a, -1)), (8, np.rot90)],
)
def test_a_photo_is_turned_upright_as_its_exif_says(draw, orientation, turn):
    image, exif = draw(0), Image.Exif()
    exif[0x0112] = orientation
    opened = open_image(encode(image, "PNG", exif=exif))
    np.testing.assert_array_equal(np.asarray(opened), turn(np.asarray(image)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_each_mode_of_a_png_comes_to_the_colours_that_pillow_shows(draw, mode):
    image = draw(1, mode=mode)
    fitted = fit_image(open_image(encode(image, "PNG")), geometry(20, 24))
    np.testing.assert_array_equal(fitted, np.asarray(image.convert("RGB")))


def test_transparency_keeps_the_colour_beneath():
    image = Image.new("RGBA", (4, 4), (200, 100, 50, 0))
    assert fit_image(open_image(encode(image, "PNG")), geometry(4, 4))[0, 0].tolist() == [200, 100, 50]


def test_a_palette_is_looked_up():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 210, 220])
    image.putpixel((1, 0), 1)
    assert fit_image(open_image(encode(image, "PNG")), geometry(1, 2)).tolist() == [[[10, 20, 30], [200, 210, 220]]]


def test_a_cmyk_jpeg_is_not_inverted():
    red = Image.new("RGB", (16, 16), (220, 30, 40)).convert("CMYK")
    fitted = fit_image(open_image(encode(red, "JPEG", quality=95)), geometry(16, 16))
    np.testing.assert_allclose(fitted.mean(axis=(0, 1)), (220, 30, 40), atol=8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP", "TIFF"])
def test_each_format_opens(draw, kind):
    assert open_image(encode(draw(2), kind)).size == (24, 20)


def test_the_format_is_told_by_content_and_not_by_name(tmp_path, draw):
    path = tmp_path / "photo.png"
    path.write_bytes(encode(draw(3), "JPEG"))
    assert open_image(path).size == (24, 20)


def test_a_path_and_its_bytes_give_one_image(tmp_path, write):
    path = write(tmp_path / "0.png", 4)
    np.testing.assert_array_equal(np.asarray(open_image(path)), np.asarray(open_image(path.read_bytes())))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_truncated_file_is_a_data_error(draw, kind):
    content = encode(draw(5, (64, 64)), kind)
    with pytest.raises(DataError, match="can't be decoded"):
        open_image(content[: len(content) // 2])


@pytest.mark.parametrize("content", [b"this is a text\n", b"GIF89a"])
def test_bytes_that_are_no_image_are_answered_with_the_known_formats(content):
    with pytest.raises(DataError, match="it is none of PNG, JPEG, BMP, WEBP, TIFF"):
        open_image(content)


@pytest.mark.parametrize("source", ["empty.png", b""])
def test_an_empty_file_is_said_to_be_empty(tmp_path, source):
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(DataError, match="can't be decoded: it is empty"):
        open_image(source if isinstance(source, bytes) else tmp_path / source)


@pytest.mark.parametrize(
    ("sizes", "num_threads"), [([500] * 9, 1), ([500] * 9 + [900_000], os.cpu_count()), ([], os.cpu_count())]
)
def test_files_that_are_decoded_in_no_time_have_one_thread(sizes, num_threads):
    assert choose_num_threads(sizes) == num_threads


def test_a_gif_is_refused(draw):
    with pytest.raises(DataError, match="it is none of"):
        open_image(encode(draw(6), "GIF"))


def test_the_file_is_named_in_the_error(tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"broken\.png can't be decoded"):
        open_image(path)


def test_a_missing_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"missing\.png can't be decoded: .*No such file"):
        open_image(tmp_path / "missing.png")


def test_a_file_that_claims_a_billion_pixels_is_refused_before_they_are_made():
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 32000, 32000, 8, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(DataError, match="exceeds limit"):
        open_image(content)


def thirds():
    """Red, green and blue beside each other, each 20 x 20."""
    pixels = np.zeros((20, 60, 3), np.uint8)
    for part in range(3):
        pixels[:, 20 * part : 20 * part + 20, part] = 255
    return Image.fromarray(pixels)


def test_crop_keeps_the_middle_and_its_aspect():
    fitted = fit_image(thirds(), geometry(20, 20, fit="crop"))
    np.testing.assert_array_equal(fitted, np.broadcast_to(np.array([0, 255, 0], np.uint8), (20, 20, 3)))


def test_crop_scales_to_cover_first():
    fitted = fit_image(thirds(), geometry(10, 10, fit="crop"))
    assert (fitted[:, 1:-1].argmax(axis=2) == 1).all()


def test_squash_keeps_the_borders():
    fitted = fit_image(thirds(), geometry(20, 20))
    assert fitted[10, 2].argmax() == 0
    assert fitted[10, 10].argmax() == 1
    assert fitted[10, 17].argmax() == 2


def test_an_image_of_the_right_size_is_not_resampled(draw):
    image = draw(7)
    np.testing.assert_array_equal(fit_image(image, geometry(20, 24, interpolation="lanczos")), np.asarray(image))


def test_one_channel_is_luminance(draw):
    image = draw(8)
    fitted = fit_image(image, geometry(20, 24, channels=1))
    assert fitted.shape == (20, 24, 1)
    np.testing.assert_array_equal(fitted[:, :, 0], np.asarray(image.convert("L")))


def test_a_geometry_survives_json():
    one = geometry(20, 24)
    assert Geometry(**one.to_json()) == one
