"""Augmentation of a whole batch at once, on the device where the images lie."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

Range = tuple[float, float]


@dataclass(frozen=True)
class Flip:
    """Mirrors left and right, or top and bottom, with a probability."""

    probability: float
    axis: int  # of (batch, channels, height, width)

    num_draws = 1

    def apply(self, images: Float[Tensor, "batch channels height width"], draws: Tensor) -> Tensor:
        return torch.where((draws[:, 0] < self.probability).view(-1, 1, 1, 1), images.flip(self.axis), images)


@dataclass(frozen=True)
class Move:
    """Scales, turns about the centre, and shifts, with a probability; what comes in from outside is black.

    Scales are factors, shifts parts of the side (not in whole pixels, as albumentations' are), rotations degrees; each
    is drawn evenly from its range.
    """

    probability: float
    scale_x: Range
    scale_y: Range
    shift_x: Range
    shift_y: Range
    rotation: Range

    num_draws = 6

    def apply(self, images: Float[Tensor, "batch channels height width"], draws: Tensor) -> Tensor:
        height, width = images.shape[2:]
        ranges = (self.scale_x, self.scale_y, self.shift_x, self.shift_y, self.rotation)
        scale_x, scale_y, shift_x, shift_y, rotation = (
            least + (most - least) * draws[:, 1 + i] for i, (least, most) in enumerate(ranges)
        )
        cos, sin = rotation.deg2rad().cos(), rotation.deg2rad().sin()
        # From a place in the result to one in the image, both in sides from -1 to 1 about the centre.
        x_of_x, x_of_y = cos / scale_x, -sin / scale_x * height / width
        y_of_x, y_of_y = sin / scale_y * width / height, cos / scale_y
        x_of_1 = -2 * (x_of_x * shift_x + x_of_y * shift_y)
        y_of_1 = -2 * (y_of_x * shift_x + y_of_y * shift_y)
        rows = [torch.stack(row, dim=1) for row in ((x_of_x, x_of_y, x_of_1), (y_of_x, y_of_y, y_of_1))]
        grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
        moved = F.grid_sample(images, grid, align_corners=False)
        return torch.where((draws[:, 0] < self.probability).view(-1, 1, 1, 1), moved, images)


class BatchedAugmentation:
    """The steps of a policy, drawn for each image from (seed, epoch, position) alone, whatever its batch."""

    def __init__(self, steps: Sequence[Flip | Move], num_images: int, seed: int, device: torch.device) -> None:
        self.steps = steps
        self.num_images = num_images
        self.seed = seed
        self.device = device
        self.epoch = -1
        self.draws: list[Tensor] = []

    def __call__(
        self, images: UInt8[Tensor, "batch channels height width"], epoch: int, positions: Tensor
    ) -> UInt8[Tensor, "batch channels height width"]:
        """Augment the images that are at these positions of the set; all lie on the device."""
        if epoch != self.epoch:
            self._draw(epoch)
        values = images.float()
        for step, draws in zip(self.steps, self.draws, strict=True):
            values = step.apply(values, draws[positions])
        return values.round().clamp(0, 255).to(torch.uint8)

    def _draw(self, epoch: int) -> None:
        generator = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + epoch)
        self.epoch = epoch
        self.draws = [
            torch.rand(self.num_images, step.num_draws, generator=generator, device=self.device) for step in self.steps
        ]
