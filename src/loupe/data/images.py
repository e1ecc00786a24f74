"""Reading one image: formats by content, EXIF rotation, 16-bit depth, and bringing it to a model's geometry."""

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from loupe.errors import DataError

MAX_PIXELS = 89_478_485  # where Pillow begins to warn of decompression bombs: a quarter of a gigabyte in RGB
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF")
ORIENTATION_TAG = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Bytes. Decoders let other threads run, and wait for them again: of files smaller than this, one thread reads the most
# (14,000 of 0.5 kB in 1.4 s; two threads take 3.1 s for them, and six 4.7 s).
SMALL_FILE = 5_000
GREY_MODES = frozenset({"1", "L", "LA", "I", "I;16", "I;16B", "I;16L"})
MODES = GREY_MODES | {"P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}
PIXELS_AT_ONCE, LEAST_AT_ONCE, MOST_AT_ONCE = 32 * 224 * 224, 16, 128  # of and in a batch
RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}


Fit = Literal["crop", "squash", "pad"]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Geometry:
    """How an image travels to a model; all lengths in pixels.

    The image is brought to (height, width) once. The model then takes the central crop of it and, where that is
    smaller than its input, enlarges it on its own device. Small images so stay small until the last moment.
    """

    height: int
    width: int
    channels: Literal[1, 3]
    crop_height: int
    crop_width: int
    input_height: int
    input_width: int
    fit: Fit
    interpolation: str
    bits: int = 16  # of a 16-bit file, how many of them hold its values: many cameras give 12

    @property
    def batch_size(self) -> int:
        """How many images a model that learns nothing from them is given at once.

        A batch has a cost of its own, which many small images share: a detector takes 6 ms for each of 16 that it sees
        at 64 x 64 pixels, and 3 ms for each of 128, on two CPU cores.
        """
        return min(MOST_AT_ONCE, max(LEAST_AT_ONCE, PIXELS_AT_ONCE // (self.input_height * self.input_width)))

    def to_json(self) -> dict[str, Any]:
        """Values that `Geometry(**values)` takes."""
        return asdict(self)


def read_image(source: Path | bytes, geometry: Geometry) -> UInt8[np.ndarray, "height width channels"]:
    """An image as a model of that geometry takes it.

    Raises:
        DataError: if it is not one whole picture in one of FORMATS; says why.
    """
    return fit_image(open_image(source, geometry.bits), geometry)


def open_image(source: Path | bytes, bits: int | None = None) -> Image.Image:
    """Decode an image whole, upright, with 16-bit depth brought to 8 bits.

    Args:
        bits: how many of the 16 hold values; None takes as many as this image's need, and 8 at least.

    Raises:
        DataError: if it is not one whole picture in one of FORMATS; says why.
    """
    return _decode(source, lambda image, _: _to_eight_bits(image, bits)[0])


def decode_image(source: Path | bytes, grey: bool = False) -> tuple[Image.Image, str, int | None]:
    """What `open_image` gives, Pillow's name of the file's pixel format, and how many bits its values need of 16.

    The latter is None where the file has not 16.

    Args:
        grey: decode to grey values alone. Of a JPEG in colour that is the luminance it holds, for two thirds of the
            time: its whole stream is read all the same, so that a broken one is found.

    Raises:
        DataError: if it is not one whole picture in one of FORMATS; says why.
    """

    def finish(image: Image.Image, mode: str) -> tuple[Image.Image, str, int | None]:
        upright, bits = _to_eight_bits(image)
        return upright.convert("L") if grey and upright.mode != "L" else upright, mode, bits

    return _decode(source, finish, grey)


def open_mask(path: Path) -> Image.Image:
    """A mask in grey, upright: 255 wherever the file has another value than 0, be it 1, or one of 16 bits.

    Raises:
        DataError: if it is not one whole picture in one of FORMATS; says why.
    """

    def finish(image: Image.Image, _: str) -> Image.Image:
        values = np.asarray(image if image.mode.startswith("I") else _to_eight_bits(image)[0].convert("RGB"))
        return Image.fromarray((values != 0).reshape(*values.shape[:2], -1).any(axis=2).astype(np.uint8) * 255)

    return _decode(path, finish)


def _decode(source: Path | bytes, finish: Callable[[Image.Image, str], Result], grey: bool = False) -> Result:
    """What `finish` makes of the image, upright and in its own depth, and of the mode that the file is written in."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            mode = image.mode
            _check_header(image)
            if grey and mode == "RGB":
                image.draft("L", image.size)
            image.load()
            return finish(_turn_upright(image), mode)
    except Exception as error:  # Pillow's readers raise a dozen kinds, whatever their parsing ran into
        name = "the image" if isinstance(source, bytes) else str(source)
        raise DataError(f"{name} can't be decoded: {_explain(error, source)}") from error


def choose_num_threads(sizes: Sequence[int]) -> int:
    """With how many threads files of these sizes, in bytes, are decoded the fastest; more than cores only wait."""
    return 1 if sum(sizes) < SMALL_FILE * len(sizes) else os.cpu_count() or 1


def _check_header(image: Image.Image) -> None:
    """Refuse what would not fit in memory, or is more than one picture. A phone's MPO is a photo and its preview."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"it has {image.width} x {image.height} pixels, and more than {MAX_PIXELS} may be an attack")
    if image.mode not in MODES:  # what is black in it, and what white, nobody says
        raise ValueError(f"its pixels are of the format {image.mode}; expected grey or colour of 8 or 16 bits")
    num_frames = getattr(image, "n_frames", 1)
    if num_frames > 1 and image.format != "MPO":
        raise ValueError(f"it holds {num_frames} pictures, and one is expected")


def _explain(error: Exception, source: Path | bytes) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        return f"it is none of {', '.join(FORMATS)}" if size else "it is empty"
    return str(error) or type(error).__name__


def _turn_upright(image: Image.Image) -> Image.Image:
    """Apply EXIF's orientation. Pillow's own function also writes the tags anew, and fails on odd ones."""
    turn = TURNS.get(image.getexif().get(ORIENTATION_TAG, 1))
    return image if turn is None else image.transpose(turn)


def _to_eight_bits(image: Image.Image, bits: int | None = None) -> tuple[Image.Image, int | None]:
    """The highest 8 of the bits that hold values, where Pillow would clip; and how many those are, None if not of 16.

    A palette with transparency becomes RGBA, the one form of it that converts to others.
    """
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA"), None
    if not image.mode.startswith("I"):
        return image, None
    values = np.clip(np.asarray(image), 0, 65535)
    bits = bits or max(8, int(values.max()).bit_length())
    return Image.fromarray(np.minimum(values >> (bits - 8), 255).astype(np.uint8)), bits


def fit_image(image: Image.Image, geometry: Geometry) -> UInt8[np.ndarray, "height width channels"]:
    """Bring an image to the geometry's height, width and channels.

    `crop` scales it to cover the target and cuts the middle out; `squash` keeps all of it and not its aspect; `pad`
    keeps both, and fills the rest with black.
    """
    image = image.convert("L" if geometry.channels == 1 else "RGB")
    target = (geometry.width, geometry.height)
    resampling = RESAMPLING[geometry.interpolation]
    if geometry.fit == "crop":
        image = ImageOps.fit(image, target, method=resampling)
    elif geometry.fit == "pad":
        image = ImageOps.pad(image, target, method=resampling)
    elif image.size != target:
        image = image.resize(target, resampling)
    return np.asarray(image).reshape(geometry.height, geometry.width, geometry.channels)
