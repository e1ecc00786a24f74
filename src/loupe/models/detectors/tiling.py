"""Large images in overlapping tiles, so that small defects stay as large as the detector of one tile sees them."""

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from loupe.errors import ConfigError
from loupe.models.detectors.base import Detector, Images, TrainedDetector

TILES_AT_ONCE = 32  # what a detector is given in one batch


@dataclass(frozen=True)
class TilingConfig:
    """The name and config of the detector of one tile, and how many tiles there are from top to bottom and across."""

    detector: str
    inner: Any
    rows: int
    columns: int


class TiledDetector(TrainedDetector):
    """An image's score is the largest of its tiles', the map the mean of theirs, weighted by the distance to the rim.

    A tile is as large as what the detector of one tile takes of an image (`crop`). Tiles lie at equal distances, the
    first and the last at the images' borders. The detector of one tile is fitted to `TiledImages`, or this one trained.
    """

    name = "tiled"
    config_type = TilingConfig

    def __init__(self, inner: Detector, rows: int, columns: int) -> None:
        super().__init__()
        self.config = TilingConfig(inner.name, inner.config, rows, columns)
        self.inner = inner
        self.least_images = inner.least_images

    @classmethod
    def build(cls, config: TilingConfig, weights: str) -> "TiledDetector":
        from loupe.models.detectors.family import build_detector  # which knows this class

        return cls(build_detector(config.detector, config.inner, weights), config.rows, config.columns)

    def _list_corners(self, height: int, width: int) -> list[tuple[int, int]]:
        """The upper left corners of the tiles of an image in pixels, row by row.

        Raises:
            ConfigError: if the tiles are larger than the image, or leave gaps.
        """
        tile_height, tile_width = self.inner.config.crop
        rows, columns = self.config.rows, self.config.columns
        if not (tile_height <= height <= rows * tile_height and tile_width <= width <= columns * tile_width):
            raise ConfigError(
                f"{rows} x {columns} tiles of {tile_height} x {tile_width} pixels don't cover images of "
                f"{height} x {width}: prepare the images as they were for training"
            )
        tops = _place(height, tile_height, rows)
        return [(top, left) for top in tops for left in _place(width, tile_width, columns)]

    def cut(
        self, images: UInt8[Tensor, "batch channels height width"]
    ) -> UInt8[Tensor, "num_tiles channels tile_height tile_width"]:
        """All images' first tiles, then all second ones, and so on."""
        height, width = self.inner.config.crop
        corners = self._list_corners(*images.shape[2:])
        return torch.cat([images[:, :, top : top + height, left : left + width] for top, left in corners])

    def stitch(
        self, maps: Float[Tensor, "num_tiles tile_height tile_width"], height: int, width: int
    ) -> Float[Tensor, "batch {height} {width}"]:
        """The maps of tiles, in the order of `cut`, as maps of images."""
        corners = self._list_corners(height, width)
        taper = _build_taper(*self.inner.config.crop).to(maps)
        tiles = maps.unflatten(0, (len(corners), -1)) * taper
        placed = (_enlarge(tile, corner, height, width) for tile, corner in zip(tiles, corners, strict=True))
        weights = (_enlarge(taper, corner, height, width) for corner in corners)
        return reduce(operator.add, placed) / reduce(operator.add, weights)

    def forward(
        self, images: UInt8[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch height width"]]:
        tiles = self.cut(images)
        chunks = [tiles] if torch.compiler.is_exporting() else tiles.split(TILES_AT_ONCE)  # a graph has no chunks
        scores, maps = zip(*map(self.inner, chunks), strict=True)
        largest = torch.cat(scores).unflatten(0, (-1, images.shape[0])).amax(dim=0)
        return largest, self.stitch(torch.cat(maps), *images.shape[2:])

    def embed(self, images: UInt8[Tensor, "batch channels height width"]) -> Float[Tensor, "batch num_values"]:
        """The mean of the tiles'."""
        parts = [self.inner.embed(chunk) for chunk in self.cut(images).split(TILES_AT_ONCE)]
        means: Tensor = torch.cat(parts).unflatten(0, (-1, images.shape[0])).mean(dim=0)
        return means

    def compute_losses(
        self, images: UInt8[Tensor, "batch channels height width"], progress: float
    ) -> dict[str, Float[Tensor, ""]]:
        """Of one tile of each image: drawn at random in training, otherwise the next one from image to image."""
        assert isinstance(self.inner, TrainedDetector)
        tiles = self.cut(images).unflatten(0, (-1, images.shape[0]))
        positions = torch.arange(len(images), device=images.device)
        chosen = torch.randint_like(positions, len(tiles)) if self.training else positions % len(tiles)
        return self.inner.compute_losses(tiles[chosen, positions], progress)


class TiledImages:
    """Batches of all tiles of batches of images, as often as they are gone through."""

    def __init__(self, detector: TiledDetector, images: Images) -> None:
        self.detector = detector
        self.images = images

    def __iter__(self) -> Iterator[UInt8[Tensor, "_batch channels tile_height tile_width"]]:
        for batch in self.images:
            yield from self.detector.cut(batch).split(TILES_AT_ONCE)


def choose_tiles(canvas: tuple[int, int], tiles: int, overlap: float) -> tuple[tuple[int, int], int, int]:
    """The tiles' (height, width) in pixels, their rows and columns: the tiles are as near to a square as they can be.

    Args:
        canvas: height and width of the prepared images in pixels.
        tiles: how many along the shorter side.
        overlap: the least part of a tile that the next one repeats, in [0, 1).
    """
    shorter = _choose_length(min(canvas), tiles, overlap)
    rows, columns = (max(tiles, round(1 + (side / shorter - 1) / (1 - overlap))) for side in canvas)
    return (_choose_length(canvas[0], rows, overlap), _choose_length(canvas[1], columns, overlap)), rows, columns


def _choose_length(side: int, tiles: int, overlap: float) -> int:
    """The least whole number of pixels of which so many tiles, each repeating `overlap` of the last, span the side."""
    return min(side, math.ceil(side / (1 + (tiles - 1) * (1 - overlap))))


def _place(side: int, tile: int, tiles: int) -> list[int]:
    """Where tiles begin along one axis."""
    return [index * (side - tile) // max(1, tiles - 1) for index in range(tiles)]


def _build_taper(height: int, width: int) -> Float[Tensor, "height width"]:
    """Weights of a tile's pixels: products of the distances to the nearer rim, in pixels, 1 at a corner."""
    rows, columns = (1 + torch.arange(length) for length in (height, width))
    return torch.outer(torch.minimum(rows, rows.flip(0)), torch.minimum(columns, columns.flip(0))).float()


def _enlarge(
    tile: Float[Tensor, "*batch tile_height tile_width"], corner: tuple[int, int], height: int, width: int
) -> Float[Tensor, "*batch {height} {width}"]:
    """Zeros around it, where it lies in the image."""
    top, left = corner
    rows, columns = tile.shape[-2:]
    return F.pad(tile, (left, width - left - columns, top, height - top - rows))
