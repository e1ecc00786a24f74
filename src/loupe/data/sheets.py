"""Contact sheets: many small pictures on one, for an eye to run over."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

TILE, GAP, CAPTION = 96, 4, 26
WIDE_TILE = 150


def draw_rows(rows: Sequence[Sequence[UInt8[np.ndarray, "height width channels"]]]) -> Image.Image:
    """Each row shows an original at the left, a gap, and versions of it; all rows have as many."""
    step = TILE + GAP
    sheet = Image.new("RGB", (step * len(rows[0]) + 2 * GAP, step * len(rows) + GAP), "white")
    for row, images in enumerate(rows):
        for column, shown in enumerate(images):
            left = GAP + column * step + (GAP if column else 0)
            sheet.paste(_to_tile(shown), (left, GAP + row * step))
    return sheet


def _to_tile(image: UInt8[np.ndarray, "height width channels"]) -> Image.Image:
    tile = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).convert("RGB")
    is_tiny = tile.width < TILE // 2
    return tile.resize((TILE, TILE), Image.Resampling.NEAREST if is_tiny else Image.Resampling.BILINEAR)


def draw_captioned(images: Sequence[Image.Image], captions: Sequence[str], num_columns: int = 6) -> Image.Image:
    """A grid of pictures, each whole and above its caption; captions are of one or two lines."""
    num_rows = max(1, -(-len(images) // num_columns))
    width, height = WIDE_TILE + GAP, WIDE_TILE + CAPTION + GAP
    sheet = Image.new("RGB", (num_columns * width + GAP, num_rows * height + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = GAP + place % num_columns * width, GAP + place // num_columns * height
        tile = image.convert("RGB")
        scale = WIDE_TILE / max(tile.size)
        tile = tile.resize((max(1, round(tile.width * scale)), max(1, round(tile.height * scale))))
        sheet.paste(tile, (left, top))
        draw.multiline_text((left, top + WIDE_TILE), caption, fill="black", font_size=10, spacing=1)
    if not images:
        draw.text((GAP, GAP), "nothing to show", fill="black", font_size=14)
    return sheet
