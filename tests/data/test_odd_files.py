"""Bad and odd files, one at a time: each is kept and decoded right, or set aside with the right reason."""

import io
import os
import re
import struct
import threading
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from loupe.data.images import decode_image, open_image
from loupe.data.manifest import SCHEMA, load_table, save_table
from loupe.errors import DataError

SIZE = (48, 32)
COLOURS = {(12, 8): (200, 30, 40), (36, 8): (30, 180, 60), (12, 24): (40, 50, 190), (36, 24): (240, 230, 220)}
UNKNOWN = "can't be decoded: it is none of PNG, JPEG, BMP, WEBP, TIFF"
# How the pixels of an upright picture lie in a file of each EXIF orientation.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def picture(mode="RGB"):
    """Four quarters of one colour each, so that a turn, a mirror or a swap of channels shows."""
    pixels = np.zeros((32, 48, 3), np.uint8)
    for (x, y), colour in COLOURS.items():
        pixels[y - 8 : y + 8, x - 12 : x + 12] = colour
    return Image.fromarray(pixels).convert(mode)


def encode(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 48, 3), dtype=np.uint8))


def turned(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    way = STORED[orientation]
    return encode(picture() if way is None else picture().transpose(way), kind, exif=exif)


def deep(kind, channels):
    """Sixteen bits a channel, whose high bytes are the picture's."""
    pixels = np.asarray(picture("RGB" if channels == 3 else "L")).astype(np.uint16) * 256 + 77
    return cv2.imencode(kind, pixels[..., ::-1] if channels == 3 else pixels)[1].tobytes()


def transparent_palette(transparency):
    return encode(picture().quantize(4), "PNG", transparency=transparency)


def half_transparent():
    image = picture("RGBA")
    image.putalpha(128)
    return image


def phone_photo():
    return encode(picture(), "MPO", save_all=True, append_images=[picture().resize((24, 16))], quality=95)


KEPT = {
    "grey.jpg": ("L", lambda: encode(picture("L"), "JPEG", quality=95)),
    "colour.jpg": ("RGB", lambda: encode(picture(), "JPEG", quality=95)),
    "cmyk.jpg": ("CMYK", lambda: encode(picture("CMYK"), "JPEG", quality=95)),
    "progressive.jpg": ("RGB", lambda: encode(picture(), "JPEG", quality=95, progressive=True)),
    "phone.jpg": ("RGB", phone_photo),
    **{f"turned{way}.jpg": ("RGB", lambda way=way: turned(way, "JPEG")) for way in STORED},
    **{f"turned{way}.png": ("RGB", lambda way=way: turned(way, "PNG")) for way in STORED},
    "turned6.webp": ("RGB", lambda: turned(6, "WEBP")),
    "turned6.tif": ("RGB", lambda: turned(6, "TIFF")),
    "bits.png": ("1", lambda: encode(picture("1"), "PNG")),
    "grey.png": ("L", lambda: encode(picture("L"), "PNG")),
    "greyalpha.png": ("LA", lambda: encode(picture("LA"), "PNG")),
    "colour.png": ("RGB", lambda: encode(picture(), "PNG")),
    "alpha.png": ("RGBA", lambda: encode(picture("RGBA"), "PNG")),
    "palette.png": ("P", lambda: encode(picture().quantize(4), "PNG")),
    "palette_one_transparent.png": ("P", lambda: transparent_palette(0)),
    "palette_many_transparent.png": ("P", lambda: transparent_palette(b"\x00\x50\xa0\xff")),
    "deep_grey.png": ("I;16", lambda: deep(".png", 1)),
    "deep_colour.png": ("RGB", lambda: deep(".png", 3)),
    "lossy.webp": ("RGB", lambda: encode(picture(), "WEBP", quality=95)),
    "lossless.webp": ("RGB", lambda: encode(picture(), "WEBP", lossless=True)),
    "alpha.webp": ("RGBA", lambda: encode(half_transparent(), "WEBP", lossless=True)),
    "grey.bmp": ("L", lambda: encode(picture("L"), "BMP")),
    "colour.bmp": ("RGB", lambda: encode(picture(), "BMP")),
    "palette.bmp": ("P", lambda: encode(picture().quantize(4), "BMP")),
    "grey.tif": ("L", lambda: encode(picture("L"), "TIFF")),
    "colour.tiff": ("RGB", lambda: encode(picture(), "TIFF")),
    "lzw.tif": ("RGB", lambda: encode(picture(), "TIFF", compression="tiff_lzw")),
    "fax.tif": ("1", lambda: encode(picture("1"), "TIFF", compression="group4")),
    "deep_grey.tif": ("I;16", lambda: deep(".tiff", 1)),
    "deep_colour.tif": ("RGB", lambda: deep(".tiff", 3)),
    "capitals.PNG": ("RGB", lambda: encode(picture(), "PNG")),
    "mixed.JpEg": ("RGB", lambda: encode(picture(), "JPEG", quality=95)),
    "mixed.Tiff": ("RGB", lambda: encode(picture(), "TIFF")),
    "really_a_jpeg.png": ("RGB", lambda: encode(picture(), "JPEG", quality=95)),
    "really_a_png.jpg": ("RGB", lambda: encode(picture(), "PNG")),
    "really_a_webp.bmp": ("RGB", lambda: encode(picture(), "WEBP", quality=95)),
    "followed_by_rubbish.jpg": ("RGB", lambda: encode(picture(), "JPEG", quality=95) + b"rubbish" * 99),
}


@pytest.fixture
def cats(tmp_path):
    """The folder of the one label."""
    folder = tmp_path / "root" / "cat"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def keep(cats, read):
    """Reads the folder, of which nothing may be set aside, and returns the one row of its manifest."""

    def keep():
        manifest, quality, quarantine = read(cats.parent)
        assert quarantine.empty, quarantine["reason"].tolist()
        assert len(manifest) == len(quality) == 1
        return manifest.iloc[0]

    return keep


@pytest.fixture
def refuse(cats, read):
    """Reads the folder, of which nothing may be kept, and returns the path and reason of the one file set aside."""

    def refuse():
        manifest, quality, quarantine = read(cats.parent)
        assert manifest.empty
        assert quality.empty
        assert quarantine["label"].tolist() == ["cat"]
        return quarantine["path"].item(), quarantine["reason"].item()

    return refuse


@pytest.mark.parametrize("name", KEPT)
def test_a_good_file_is_kept_and_shows_what_was_drawn(cats, keep, name):
    mode, make = KEPT[name]
    (cats / name).write_bytes(make())
    row = keep()
    assert (row["path"], row["mode"], row["width"], row["height"]) == (f"cat/{name}", mode, *SIZE)
    expected = picture({"I;16": "L", "P": "RGB"}.get(mode, mode)).convert("RGB")
    shown = open_image(cats / name)
    assert shown.size == SIZE
    if mode == "1":
        np.testing.assert_array_equal(np.asarray(shown.convert("RGB")), np.asarray(expected))
    for place in COLOURS:
        np.testing.assert_allclose(shown.convert("RGBA").getpixel(place)[:3], expected.getpixel(place), atol=14)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 2)])
@pytest.mark.parametrize("kind", ["png", "jpg", "bmp", "webp", "tif"])
def test_a_tiny_image_is_kept(cats, keep, size, kind):
    Image.new("RGB", size, (200, 100, 50)).save(cats / f"0.{kind}")
    row = keep()
    assert (row["width"], row["height"]) == size
    np.testing.assert_allclose(open_image(cats / f"0.{kind}").getpixel((0, 0)), (200, 100, 50), atol=6)


NAMES = [
    "with spaces.png",
    "double\"quote and 'single.png",
    "new\nline.png",
    "tab\there.png",
    "comma,semicolon;.png",
    "back\\slash.png",
    "-leading.png",
    "100%s {braces} $HOME *.png",
    "кошка.png",
    "猫.png",
    "고양이.png",
    "קטט.png",
    "قطة.png",
    "बिल्ली.png",
    "γάτα.png",
    "naïve_café.png",
    "e\u0301.png",
    "🐈.png",
    "many.dots.jpg.png",
    "l" + "o" * 245 + "ng.png",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_any_name_is_kept_under_it_also_in_the_saved_table(cats, read, tmp_path, name):
    picture().save(cats / name)
    manifest, _, quarantine = read(cats.parent)
    assert quarantine.empty
    save_table(manifest, tmp_path / "manifest.parquet", SCHEMA)
    assert load_table(tmp_path / "manifest.parquet")["path"].tolist() == [f"cat/{name}"]


def test_a_name_that_is_no_unicode_does_not_stop_the_others(cats, read, tmp_path):
    picture().save(cats / "0.png")
    content = (cats / "0.png").read_bytes()
    descriptor = os.open(os.fsencode(cats) + b"/caf\xe9.png", os.O_CREAT | os.O_WRONLY)
    os.write(descriptor, content)
    os.close(descriptor)
    manifest, _, quarantine = read(cats.parent)
    save_table(manifest, tmp_path / "manifest.parquet", SCHEMA)
    assert "cat/0.png" in set(manifest["path"])
    assert len(manifest) + len(quarantine) == 2


def test_two_names_that_look_alike_are_two_files(cats, read):
    noise(0).save(cats / "\u00e9.png")
    noise(1).save(cats / "e\u0301.png")
    assert read(cats.parent)[0]["image_id"].nunique() == 2


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_that_declares(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def bmp_that_declares(width, height):
    content = bytearray(encode(noise(), "BMP"))
    content[18:26] = struct.pack("<ii", width, height)
    return bytes(content)


def png_with_a_long_text():
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "a" * 2_000_000, zip=True)
    return encode(noise(), "PNG", pnginfo=text)


def several(kind, **options):
    return encode(noise(0), kind, save_all=True, append_images=[noise(1), noise(2)], **options)


PDF = b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF\n"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n0 0 moveto 10 10 lineto stroke\nshowpage\n"
SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><circle r="4"/></svg>'
REFUSED = {
    "zero_bytes.png": (lambda: b"", "can't be decoded: it is empty"),
    "zero_bytes.jpg": (lambda: b"", "can't be decoded: it is empty"),
    "one_byte.png": (lambda: b"\x89", UNKNOWN),
    "text.png": (lambda: b"this is no image\n", UNKNOWN),
    "html.jpg": (lambda: b"<!DOCTYPE html><html><body>404 Not Found</body></html>", UNKNOWN),
    "json.png": (lambda: b'{"error": "not found"}', UNKNOWN),
    "gif.png": (lambda: encode(noise(), "GIF"), UNKNOWN),
    "svg.png": (lambda: SVG, UNKNOWN),
    "pdf.png": (lambda: PDF, UNKNOWN),
    "eps.png": (lambda: EPS, UNKNOWN),
    "ico.png": (lambda: encode(noise(), "ICO"), UNKNOWN),
    "ppm.bmp": (lambda: encode(noise(), "PPM"), UNKNOWN),
    "zip.tif": (lambda: b"PK\x03\x04" + bytes(200), UNKNOWN),
    "pointer_of_git_lfs.png": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", UNKNOWN),
    "random.png": (lambda: np.random.default_rng(0).bytes(5000), UNKNOWN),
    "random.jpg": (lambda: np.random.default_rng(1).bytes(5000), UNKNOWN),
    "zeros.tif": (lambda: bytes(5000), UNKNOWN),
    "only_a_signature.png": (lambda: b"\x89PNG\r\n\x1a\n", "can't be decoded: "),
    "only_a_header.png": (lambda: encode(noise(), "PNG")[:33], "can't be decoded: "),
    "only_a_header.jpg": (lambda: encode(noise(), "JPEG")[:20], "can't be decoded: "),
    "only_a_header.bmp": (lambda: encode(noise(), "BMP")[:54], "truncated"),
    "only_a_header.tif": (lambda: encode(noise(), "TIFF")[:8], "can't be decoded: "),
    "only_a_header.webp": (lambda: encode(noise(), "WEBP")[:12], "can't be decoded: "),
    "bomb.png": (lambda: png_that_declares(30_000, 30_000), "exceeds limit"),
    "bomb.bmp": (lambda: bmp_that_declares(30_000, 30_000), "exceeds limit"),
    "small_bomb.png": (lambda: png_that_declares(12_000, 10_000), "12000 x 10000 pixels"),
    "long_text.png": (png_with_a_long_text, "can't be decoded: .*large"),
    "animated.gif.png": (lambda: several("GIF"), UNKNOWN),
    "animated.png": (lambda: several("PNG"), "it holds 3 pictures, and one is expected"),
    "animated.webp": (lambda: several("WEBP"), "it holds 3 pictures, and one is expected"),
    "pages.tif": (lambda: several("TIFF"), "it holds 3 pictures, and one is expected"),
    "pages_lzw.tif": (lambda: several("TIFF", compression="tiff_lzw"), "it holds 3 pictures, and one is expected"),
}
FORMATS = {
    "jpg": lambda: encode(noise(), "JPEG"),
    "progressive.jpg": lambda: encode(noise(), "JPEG", progressive=True),
    "png": lambda: encode(noise(), "PNG"),
    "webp": lambda: encode(noise(), "WEBP"),
    "lossless.webp": lambda: encode(noise(), "WEBP", lossless=True),
    "bmp": lambda: encode(noise(), "BMP"),
    "tif": lambda: encode(noise(), "TIFF"),
    "lzw.tif": lambda: encode(noise(), "TIFF", compression="tiff_lzw"),
    "pages.tif": lambda: several("TIFF"),
    "animated.webp": lambda: several("WEBP"),
}
ANY = {
    **FORMATS,
    "phone.jpg": phone_photo,
    "turned.jpg": lambda: turned(6, "JPEG"),
    "animated.png": lambda: several("PNG"),
}


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what it finds in damaged files
@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_file_is_set_aside_with_its_reason(cats, refuse, name):
    make, reason = REFUSED[name]
    (cats / name).write_bytes(make())
    path, told = refuse()
    assert path == f"cat/{name}"
    assert told.startswith("can't be decoded: ")
    assert re.search(reason, told)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what it finds in damaged files
@pytest.mark.parametrize("percent", [5, 25, 50, 75, 95])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_truncated_file_is_set_aside(cats, refuse, kind, percent):
    content = FORMATS[kind]()
    (cats / f"0.{kind}").write_bytes(content[: len(content) * percent // 100])
    assert refuse()[1].startswith("can't be decoded: ")


def decode_or_refuse(content):
    """Anything else than an image or a DataError would end a run for one bad file."""
    try:
        assert decode_image(content)[0].width > 0
    except DataError as error:
        assert str(error)  # noqa: PT017 (an image is as good an end)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what it finds in damaged files
@pytest.mark.parametrize("kind", ANY)
def test_a_file_cut_at_whatever_byte_is_an_image_or_a_data_error(kind):
    content = ANY[kind]()
    for end in [*range(min(len(content), 400)), *range(400, len(content), 97)]:
        decode_or_refuse(content[:end])


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what it finds in damaged files
@pytest.mark.parametrize("kind", ANY)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(changes=st.lists(st.tuples(st.integers(0, 399), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_file_with_damaged_bytes_is_an_image_or_a_data_error(kind, changes):
    content = bytearray(ANY[kind]())
    for place, value in changes:
        content[place % len(content)] = value
    decode_or_refuse(bytes(content))


@pytest.mark.parametrize(("tag", "kind"), [(0x0100, 2), (0x010E, 5), (0x011A, 2), (0x9000, 11)])
def test_a_photo_with_a_tag_of_a_wrong_type_is_kept_and_upright(cats, keep, tag, kind):
    orientation = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    tags = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + orientation + struct.pack("<HHII", tag, kind, 1, 5)
    stored = picture().transpose(STORED[6])
    (cats / "0.jpg").write_bytes(encode(stored, "JPEG", quality=95, exif=tags + b"\0\0\0\0"))
    row = keep()
    assert (row["width"], row["height"]) == SIZE


def test_a_link_to_nothing_is_set_aside(cats, refuse):
    (cats / "0.png").symlink_to("nowhere.png")
    assert refuse() == ("cat/0.png", "is a link to nothing")


def test_a_link_to_itself_is_set_aside(cats, refuse):
    (cats / "0.png").symlink_to("0.png")
    assert refuse()[0] == "cat/0.png"


def test_a_link_that_leaves_the_folder_is_set_aside(cats, refuse, tmp_path):
    picture().save(tmp_path / "outside.png")
    (cats / "0.png").symlink_to(tmp_path / "outside.png")
    assert refuse() == ("cat/0.png", "is a link that leaves the folder")


def test_a_link_to_a_folder_beside_that_begins_with_the_same_name_leaves_the_folder(cats, refuse, tmp_path):
    (tmp_path / "root2").mkdir()
    picture().save(tmp_path / "root2" / "0.png")
    (cats / "0.png").symlink_to("../../root2/0.png")
    assert refuse() == ("cat/0.png", "is a link that leaves the folder")


def test_a_link_within_the_folder_is_kept_with_the_id_of_what_it_shows(cats, read):
    picture().save(cats / "0.png")
    (cats / "1.png").symlink_to("0.png")
    manifest, _, quarantine = read(cats.parent)
    assert manifest["path"].tolist() == ["cat/0.png", "cat/1.png"]
    assert manifest["image_id"].nunique() == 1
    assert quarantine.empty


def test_a_source_that_is_itself_a_link_is_read(cats, read, tmp_path):
    picture().save(cats / "0.png")
    (tmp_path / "link").symlink_to(cats.parent)
    assert read(tmp_path / "link")[0]["path"].tolist() == ["cat/0.png"]


def test_nothing_is_read_through_a_link_to_a_folder_that_leaves_the_root(cats, read, tmp_path):
    (tmp_path / "outside").mkdir()
    noise().save(tmp_path / "outside" / "0.png")
    picture().save(cats / "0.png")
    (cats / "more").symlink_to(tmp_path / "outside")
    assert read(cats.parent)[0]["path"].tolist() == ["cat/0.png"]


@pytest.mark.parametrize("name", ["more", "more.png"])
def test_a_link_to_a_folder_is_set_aside_and_not_passed_over_in_silence(cats, read, tmp_path, name):
    (tmp_path / "outside").mkdir()
    noise().save(tmp_path / "outside" / "0.png")
    picture().save(cats / "0.png")
    (cats / name).symlink_to(tmp_path / "outside")
    quarantine = read(cats.parent)[2]
    assert quarantine["path"].tolist() == [f"cat/{name}"]
    assert "link" in quarantine["reason"].item()


def test_a_link_round_to_the_folder_itself_ends(cats, read):
    picture().save(cats / "0.png")
    (cats / "again").symlink_to(cats.parent)
    assert read(cats.parent)[0]["path"].tolist() == ["cat/0.png"]


def test_an_empty_folder_with_the_name_of_an_image_is_no_image(cats, read):
    picture().save(cats / "0.png")
    (cats / "x.png").mkdir()
    manifest, _, quarantine = read(cats.parent)
    assert manifest["path"].tolist() == ["cat/0.png"]
    assert quarantine.empty


def test_images_in_a_folder_with_the_name_of_an_image_are_kept(cats, keep):
    (cats / "x.png").mkdir()
    picture().save(cats / "x.png" / "0.png")
    assert keep()["path"] == "cat/x.png/0.png"


def test_two_equal_files_are_kept_under_one_id_with_one_quality(cats, read):
    picture().save(cats / "0.png")
    (cats / "1.png").write_bytes((cats / "0.png").read_bytes())
    manifest, quality, quarantine = read(cats.parent)
    assert len(manifest) == 2
    assert manifest["image_id"].nunique() == len(quality) == 1
    assert quarantine.empty


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_a_named_pipe_is_set_aside_and_not_waited_for(cats, read):
    pipe, ended = cats / "0.png", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: ended.append(read(cats.parent)[2]), daemon=True)
    reader.start()
    reader.join(timeout=1)
    waited_for = reader.is_alive()
    if waited_for:
        os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))  # lets the reader end
        reader.join()
    assert not waited_for
    assert ended[0]["path"].tolist() == ["cat/0.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read_is_set_aside(cats, refuse):
    picture().save(cats / "0.png")
    (cats / "0.png").chmod(0)
    assert refuse() == ("cat/0.png", "Permission denied")
