"""The last part of an image's way to a network, on the network's device."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F


class Preprocess(nn.Module):
    """uint8 pixels to a network's input: central crop, resize, scale to [0, 1], normalise.

    A model carries its own, so that training, evaluation and serving can't differ.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        crop: tuple[int, int],
        size: tuple[int, int],
        channels: int,
        mean: Sequence[float],
        std: Sequence[float],
        memory_format: torch.memory_format = torch.channels_last,
    ) -> None:
        """Lengths are (height, width) in pixels; mean and std are of values in [0, 1], one a channel."""
        super().__init__()
        self.memory_format = memory_format
        self.crop = crop
        self.size = size
        self.channels = channels
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(
        self, images: UInt8[Tensor, "batch prepared_channels prepared_height prepared_width"]
    ) -> Float[Tensor, "batch channels height width"]:
        height, width = self.crop
        top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
        values = images[:, :, top : top + height, left : left + width].to(self.mean.dtype) / 255
        if self.crop != self.size:
            values = F.interpolate(values, size=self.size, mode="bilinear", antialias=True)
        values = (values.expand(-1, self.channels, -1, -1) - self.mean) / self.std
        return values.contiguous(memory_format=self.memory_format)
