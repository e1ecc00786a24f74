"""Reading one image: formats by content, EXIF rotation, 16-bit depth, and bringing it to a model's geometry."""

import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from loupe.errors import DataError

FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF")
GREY_MODES = frozenset({"1", "L", "LA", "I", "I;16", "I;16B", "I;16L"})
RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}


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
    fit: Literal["crop", "squash"]
    interpolation: str

    def to_json(self) -> dict[str, Any]:
        """Values that `Geometry(**values)` takes."""
        return asdict(self)


def open_image(source: Path | bytes) -> Image.Image:
    """Decode an image whole, upright, with 16-bit depth brought to 8 bits.

    Raises:
        DataError: if it can't be read as one of FORMATS; says why.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            image.load()
            return _to_eight_bits(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        name = "the image" if isinstance(source, bytes) else str(source)
        raise DataError(f"{name} can't be decoded: {_explain(error)}") from error


def read_mode(content: bytes) -> str:
    """Pillow's name of the pixel format that a file is written in."""
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        return image.mode


def _explain(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return f"it is none of {', '.join(FORMATS)}"
    return str(error) or type(error).__name__


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Pillow clips 16-bit values when it converts them; the high byte is what an eye would see."""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    return Image.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8))


def fit_image(image: Image.Image, geometry: Geometry) -> UInt8[np.ndarray, "height width channels"]:
    """Bring an image to the geometry's height, width and channels.

    `crop` scales it to cover the target and cuts the middle out; `squash` keeps all of it and not its aspect.
    """
    image = image.convert("L" if geometry.channels == 1 else "RGB")
    target = (geometry.width, geometry.height)
    resampling = RESAMPLING[geometry.interpolation]
    if geometry.fit == "crop":
        image = ImageOps.fit(image, target, method=resampling)
    elif image.size != target:
        image = image.resize(target, resampling)
    return np.asarray(image).reshape(geometry.height, geometry.width, geometry.channels)
