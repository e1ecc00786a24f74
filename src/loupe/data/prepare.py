"""Decoding every image once: choosing a geometry, and writing all images of a task into one .npy array."""

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Int64, UInt8
from numpy.lib.format import open_memmap
from PIL import ImageFilter

from loupe.data.images import GREY_MODES, Fit, Geometry, choose_num_threads, fit_image, open_mask, read_image
from loupe.data.manifest import load_table, save_table

IN_MEMORY_BYTES = 1 << 30
MOST_SHRINKAGE = 16  # of a mask at once
ELONGATED = 1.6  # above this aspect a central crop would lose too much
CHUNK = 64  # files that a thread decodes at a time
SMALLEST_INPUT = 64  # a stride of 32 leaves a 2x2 map of it
Size = tuple[int, int]  # height and width in pixels

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Canvas:
    """How large a detector looks at images, in pixels: `smallest` is of each side, `largest` of a square as large.

    Images are shown at `scale` times their own size within these, with sides that are multiples of `multiple`.
    """

    smallest: int
    largest: int
    scale: int
    multiple: int

    def choose_size(self, side: int, aspect: float) -> Size:
        """Height and width for images of that shorter side and that height by width."""
        square = min(self.largest, max(self.smallest, self.scale * side))
        lengths = (square * math.sqrt(aspect), square / math.sqrt(aspect))
        height, width = (max(self.smallest, round(length / self.multiple) * self.multiple) for length in lengths)
        return height, width


# The pixels that autoencoders rebuild, and the pixels of which a backbone's features are taken.
PIXELS, FEATURES = Canvas(32, 128, 1, 16), Canvas(64, 320, 2, 32)


@dataclass(frozen=True)
class Prepared:
    """Images of one task. Row i of `images` is row i of `index` (image_id, label, split, mask_row, path).

    `masks` has a row for each image with a mask (`mask_row` points there, -1 where there is none), 1 where anomalous.
    """

    images: UInt8[np.ndarray, "num_images height width channels"]
    masks: UInt8[np.ndarray, "num_masks height width"]
    index: pd.DataFrame
    geometry: Geometry

    def rows_of(self, split: str) -> np.ndarray:
        """Positions of a split's images."""
        return np.flatnonzero(self.index["split"].eq(split))

    def read_batches(
        self, rows: Int64[np.ndarray, " num_images"], batch_size: int | None = None
    ) -> Iterator[UInt8[np.ndarray, "batch channels height width"]]:
        """The images at these rows in batches, channels first, as networks take them; None for the geometry's own."""
        batch_size = batch_size or self.geometry.batch_size
        for start in range(0, len(rows), batch_size):
            yield np.ascontiguousarray(self.images[rows[start : start + batch_size]].transpose(0, 3, 1, 2))


def choose_classifier_geometry(
    rows: pd.DataFrame,
    input_size: Size | None,
    fit: Fit | None,
    native_size: int,
    crop_fraction: float,
    interpolation: str,
) -> Geometry:
    """Photos get the backbone's own size and crop; small images twice their side, enlarged only on the device.

    Args:
        rows: manifest rows of the task; width, height, mode and bits are looked at.
        input_size: height and width of the network's input; None chooses a square.
        fit: None crops, unless the images are elongated.
        native_size: side the backbone was pretrained at.
        crop_fraction: part of the prepared side that the central crop keeps.
        interpolation: a name of `images.RESAMPLING`.
    """
    side = _compute_side(rows)
    if input_size is None:
        chosen = max(SMALLEST_INPUT, min(native_size, -(-2 * side // 32) * 32))
        input_size = (chosen, chosen)
    aspect = (rows[["width", "height"]].max(axis=1) / rows[["width", "height"]].min(axis=1)).median()
    fit = fit or ("squash" if aspect > ELONGATED else "crop")
    prepared = _shrink(input_size, side)
    if fit == "crop" and prepared == input_size:
        # Photos a little smaller than the margin are enlarged to it: what is cropped is then what the backbone knows.
        prepared = (round(input_size[0] / crop_fraction), round(input_size[1] / crop_fraction))
    crop = (min(prepared[0], input_size[0]), min(prepared[1], input_size[1]))
    return _build_geometry(rows, prepared, crop, input_size, fit, interpolation)


def choose_detector_geometry(rows: pd.DataFrame, canvas: Canvas, input_size: Size | None, fit: Fit | None) -> Geometry:
    """All of the image is kept, as defects may lie at a border, and nearly its shape: the median of the images'.

    Args:
        rows: manifest rows of the images that it is fitted to; width, height, mode and bits are looked at.
        canvas: what the detector's own choice of a size keeps to.
        input_size: height and width of the network's input; None chooses.
        fit: None squashes, which hardly shows where images are shaped alike.
    """
    side = _compute_side(rows)
    input_size = input_size or canvas.choose_size(side, (rows["height"] / rows["width"]).median())
    prepared = _shrink(input_size, side)
    return _build_geometry(rows, prepared, prepared, input_size, fit or "squash", "bilinear")


def _compute_side(rows: pd.DataFrame) -> int:
    """The median of the shorter sides, in pixels."""
    return int(rows[["width", "height"]].min(axis=1).median())


def _shrink(size: Size, side: int) -> Size:
    """`size` brought down, aspect kept, until its shorter side is no longer than the images have."""
    factor = min(1.0, side / min(size))
    return round(size[0] * factor), round(size[1] * factor)


def _build_geometry(
    rows: pd.DataFrame, prepared: Size, crop: Size, input_size: Size, fit: Fit, interpolation: str
) -> Geometry:
    return Geometry(
        height=prepared[0],
        width=prepared[1],
        channels=1 if rows["mode"].isin(GREY_MODES).all() else 3,
        crop_height=crop[0],
        crop_width=crop[1],
        input_height=input_size[0],
        input_width=input_size[1],
        fit=fit,
        interpolation=interpolation,
        bits=16 if rows["bits"].isna().all() else int(rows["bits"].max()),
    )


def prepare_images(root: Path, rows: pd.DataFrame, geometry: Geometry, folder: Path) -> None:
    """Write `folder` with images.npy, masks.npy, index.parquet and geometry.json.

    Args:
        root: the source folder.
        rows: image_id, label, split, path, num_bytes and mask_path of the task's images, one row a content.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = rows.sort_values("image_id").reset_index(drop=True)
    masked = rows["mask_path"].notna()
    num_threads = choose_num_threads(rows["num_bytes"].tolist())
    _fill_array(
        folder / "images.npy",
        list(rows["path"]),
        (geometry.height, geometry.width, geometry.channels),
        lambda path: read_image(root / path, geometry),
        num_threads,
    )
    _fill_array(
        folder / "masks.npy",
        list(rows.loc[masked, "mask_path"]),
        (geometry.height, geometry.width),
        lambda path: _fit_mask(root / path, geometry),
        num_threads,
    )
    index = rows[["image_id", "label", "split", "path"]].assign(
        mask_row=np.where(masked, masked.cumsum() - 1, -1).astype(np.int64)
    )
    save_table(index, folder / "index.parquet")
    (folder / "geometry.json").write_text(json.dumps(geometry.to_json(), indent=2) + "\n")


def _fill_array(
    path: Path,
    sources: Sequence[str],
    shape: tuple[int, ...],
    make_row: Callable[[str], UInt8[np.ndarray, "..."]],
    num_threads: int,
) -> None:
    """Write an array row by row through a memory map, so that memory stays bounded whatever the number of images."""
    unfinished = path.with_suffix(".unfinished")
    if not sources:  # a memory map can't be empty
        with unfinished.open("wb") as file:
            np.save(file, np.empty((0, *shape), np.uint8))
    else:
        array = open_memmap(unfinished, mode="w+", dtype=np.uint8, shape=(len(sources), *shape))

        def fill(start: int) -> None:
            for row, source in enumerate(sources[start : start + CHUNK], start):
                array[row] = make_row(source)

        with ThreadPoolExecutor(num_threads) as pool:
            for _ in pool.map(fill, range(0, len(sources), CHUNK)):
                pass
        array.flush()
    unfinished.replace(path)


def _fit_mask(path: Path, geometry: Geometry) -> UInt8[np.ndarray, "height width"]:
    """1 where any of the mask falls: smoothing would lose defects thinner than a pixel."""
    grey = Geometry(**{**geometry.to_json(), "channels": 1, "interpolation": "bilinear"})
    mask = open_mask(path)
    shrinkage = max(mask.height / geometry.height, mask.width / geometry.width)
    if shrinkage > MOST_SHRINKAGE:  # a pixel's part of a place would be rounded to nothing
        mask = mask.filter(ImageFilter.MaxFilter(2 * int(shrinkage / MOST_SHRINKAGE) + 1))
    return (fit_image(mask, grey)[:, :, 0] > 0).astype(np.uint8)


def load_prepared(folder: Path) -> Prepared:
    """Open what `prepare_images` wrote: into memory where it is small, otherwise mapped, and read as it is used."""
    path = folder / "images.npy"
    images = _open_array(path)
    where = "memory" if not isinstance(images, np.memmap) else "disk"
    log.info("%s: %d images, %.0f MB, read from %s", path, len(images), images.nbytes / 1e6, where)
    return Prepared(
        images=images,
        masks=_open_array(folder / "masks.npy"),
        index=load_table(folder / "index.parquet"),
        geometry=Geometry(**json.loads((folder / "geometry.json").read_text())),
    )


def _open_array(path: Path) -> UInt8[np.ndarray, "..."]:
    array: np.ndarray = np.load(path, mmap_mode=None if path.stat().st_size <= IN_MEMORY_BYTES else "r")
    return array
