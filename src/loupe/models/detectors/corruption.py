"""Corrupted copies of images, drawn in whole batches on their device by torch's global generator there."""

import math

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

BLOCK = 8  # side of a masked block in pixels
DEFECT_AREAS, DEFECT_ASPECTS = (0.02, 0.15), (0.3, 3.3)  # of a pasted rectangle, as CutPaste has them
LEAST_CELL = 4  # side in pixels of the finest cells of Perlin noise
PERLIN_THRESHOLD = 0.5  # of the highest value in the image
LEAST_OPACITY = 0.3


def corrupt(
    images: Float[Tensor, "batch channels height width"], noise: float, masked: float, defects: float
) -> Float[Tensor, "batch channels height width"]:
    """Paste defects, mask blocks and add noise, in this order; values stay in [0, 1]. What is 0 is never done.

    Args:
        noise: standard deviation of Gaussian noise, the images being in [0, 1].
        masked: the chance of each block of BLOCK x BLOCK pixels to be blackened, independently of the others.
        defects: the chance of each image to get a defect.
    """
    if defects:
        images = paste_defects(images, defects)
    if masked:
        images = mask_blocks(images, masked)
    if noise:
        images = (images + noise * torch.randn_like(images)).clamp(0, 1)
    return images


def mask_blocks(
    images: Float[Tensor, "batch channels height width"], part: float
) -> Float[Tensor, "batch channels height width"]:
    """Blacken blocks of a grid, each with this chance: masking noise, in blocks as neighbouring pixels are alike."""
    batch, _, height, width = images.shape
    rows, columns = -(-height // BLOCK), -(-width // BLOCK)
    is_masked = torch.rand(batch, 1, rows, columns, device=images.device) < part
    is_masked = is_masked.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)[:, :, :height, :width]
    return images.masked_fill(is_masked, 0)


def paste_defects(
    images: Float[Tensor, "batch channels height width"], probability: float
) -> Float[Tensor, "batch channels height width"]:
    """Give each image a defect with this chance: something foreign, more or less opaque, in one of two shapes.

    Half are rectangles, as in CutPaste (Li et al., 2021, arXiv:2104.04015), half have the shapes of Perlin noise above
    a threshold, as in DRAEM (Zavrtanik et al., 2021, arXiv:2108.07610).
    """
    batch, _, height, width = images.shape
    is_rectangle, is_pasted = torch.rand(2, batch, 1, 1, device=images.device)
    rectangles = draw_rectangles(batch, height, width, images.device)
    blots = draw_blots(batch, height, width, images.device)
    shapes = torch.where(is_rectangle < 0.5, rectangles, blots) & (is_pasted < probability)
    opacity = LEAST_OPACITY + (1 - LEAST_OPACITY) * torch.rand(batch, 1, 1, 1, device=images.device)
    return torch.where(shapes[:, None], images.lerp(draw_foreign(images), opacity), images)


def draw_foreign(images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
    """For each image another of the batch, moved round its borders, and mixed with one colour."""
    batch, channels, height, width = images.shape
    device = images.device
    others = images[torch.randperm(batch, device=device)]
    rows = (torch.arange(height, device=device) + torch.randint(height, (batch, 1), device=device)) % height
    columns = (torch.arange(width, device=device) + torch.randint(width, (batch, 1), device=device)) % width
    one = torch.arange(batch, device=device)[:, None, None]
    moved = others.permute(0, 2, 3, 1)[one, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    colours, flatness = torch.rand(batch, channels, 1, 1, device=device), torch.rand(batch, 1, 1, 1, device=device)
    return moved.lerp(colours, flatness)


def draw_rectangles(
    batch: int, height: int, width: int, device: torch.device
) -> Bool[Tensor, "{batch} {height} {width}"]:
    """One in each image, of an area in DEFECT_AREAS, its middle anywhere."""
    draws = torch.rand(4, batch, 1, device=device)
    area = DEFECT_AREAS[0] + (DEFECT_AREAS[1] - DEFECT_AREAS[0]) * draws[0]
    least, most = math.log(DEFECT_ASPECTS[0]), math.log(DEFECT_ASPECTS[1])
    aspect = (least + (most - least) * draws[1]).exp()
    in_rows = (_place(height, device) - draws[2]).abs() < (area * aspect).sqrt() / 2
    in_columns = (_place(width, device) - draws[3]).abs() < (area / aspect).sqrt() / 2
    return in_rows[:, :, None] & in_columns[:, None, :]


def draw_blots(batch: int, height: int, width: int, device: torch.device) -> Bool[Tensor, "{batch} {height} {width}"]:
    """Perlin noise above half of its highest value; of 2, 4, 8 ... cells along each side, drawn for each image."""
    most_cells = max(2, min(height, width) // LEAST_CELL)
    cells = 2 ** torch.randint(1, int(math.log2(most_cells)) + 1, (batch, 2), device=device)
    angles = 2 * math.pi * torch.rand(batch, most_cells + 1, most_cells + 1, device=device)
    noise = compute_perlin(angles, cells, height, width)
    return noise > PERLIN_THRESHOLD * noise.amax(dim=(1, 2), keepdim=True)


def compute_perlin(
    angles: Float[Tensor, "batch nodes nodes"], cells: Int64[Tensor, "batch 2"], height: int, width: int
) -> Float[Tensor, "batch {height} {width}"]:
    """Gradient noise (Perlin, "Improving noise", 2002), 0 at the nodes of each image's lattice, in [-1, 1].

    Args:
        angles: directions of the gradients at the nodes, in radians; more than `cells` of them on either side.
        cells: of each image, along its rows and its columns.
    """
    y = _place(height, angles.device) * cells[:, :1]
    x = _place(width, angles.device) * cells[:, 1:]
    row, column = y.long(), x.long()
    one = torch.arange(len(angles), device=angles.device)[:, None, None]

    def rise(below: int, right: int) -> Tensor:
        """Along the gradient at one corner of each pixel's cell."""
        angle = angles[one, row[:, :, None] + below, column[:, None, :] + right]
        return angle.sin() * (y - row - below)[:, :, None] + angle.cos() * (x - column - right)[:, None, :]

    down, across = _fade(y - row)[:, :, None], _fade(x - column)[:, None, :]
    upper, lower = rise(0, 0).lerp(rise(0, 1), across), rise(1, 0).lerp(rise(1, 1), across)
    return math.sqrt(2) * upper.lerp(lower, down)


def _place(num_pixels: int, device: torch.device) -> Float[Tensor, " {num_pixels}"]:
    """Middles of the pixels of a side, as parts of it."""
    return (torch.arange(num_pixels, device=device) + 0.5) / num_pixels


def _fade(part: Tensor) -> Tensor:
    """From 0 to 1 with no slope and no curvature at either end."""
    return part**3 * (part * (6 * part - 15) + 10)
