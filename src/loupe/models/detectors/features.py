"""Features of a frozen pretrained backbone at several scales: what the detectors that don't look at pixels look at."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from loupe.errors import ConfigError
from loupe.models.input_size import build_shapes, check_input_size
from loupe.models.preprocess import Preprocess

NUM_LEVELS = 4  # of a convolutional network the strides 4, 8, 16 and 32
LEAST_PLACES = 2  # rows and columns of the coarsest level

Features = list[Float[Tensor, "batch _channels _rows _columns"]]


@dataclass(frozen=True)
class FeatureConfig:
    """All that it takes to make the extractor again, but for the weights.

    `crop` and `size` are (height, width) in pixels: what is taken of the prepared images, and what the backbone sees.
    `mean` and `std` are the backbone's own, one a channel.
    """

    backbone: str
    crop: tuple[int, int]
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


class FeatureExtractor(nn.Module):
    """uint8 images to features of the backbone's last NUM_LEVELS levels, finest first.

    Each is averaged over its 3 x 3 neighbourhood, as in PatchCore (Roth et al., 2022, arXiv:2106.08265).
    """

    def __init__(self, config: FeatureConfig, backbone: nn.Module) -> None:
        """Takes the backbone whole, and leaves out of it what comes after the last level."""
        super().__init__()
        channels = len(config.mean)
        self.preprocess = Preprocess(config.crop, config.size, channels, config.mean, config.std)
        self.levels: list[int] = backbone.prune_intermediate_layers(NUM_LEVELS, prune_head=True)  # type: ignore[operator]
        self.backbone = backbone.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.shapes = measure_levels(config)

    @property
    def device(self) -> torch.device:
        """Where images must lie."""
        return self.preprocess.mean.device

    def train(self, mode: bool = True) -> "FeatureExtractor":
        """The backbone stays frozen: normalisation keeps its own statistics."""
        return super().train(False)

    def forward(self, images: UInt8[Tensor, "batch channels height width"]) -> Features:
        maps = self.backbone.forward_intermediates(  # type: ignore[operator]
            self.preprocess(images), indices=self.levels, intermediates_only=True
        )
        return [F.avg_pool2d(level, 3, stride=1, padding=1, count_include_pad=False) for level in maps]


def measure_levels(config: FeatureConfig) -> list[tuple[int, int, int]]:
    """Channels, rows and columns of each level, finest first.

    Raises:
        WeightsError: if timm has no such backbone.
        ConfigError: if it gives no features at several levels, or the input is too small.
    """
    height, width = config.size
    channels = len(config.mean)
    check_input_size(config.backbone, height, width, channels)
    network = build_shapes(config.backbone, config.size, channels)
    if not hasattr(network, "prune_intermediate_layers"):
        raise ConfigError(f"timm's {config.backbone} gives no features at several levels: choose another backbone")
    levels = network.prune_intermediate_layers(NUM_LEVELS, prune_head=True)  # type: ignore[operator]
    blank = torch.empty(1, channels, height, width, device="meta")
    maps = network.forward_intermediates(blank, indices=levels, intermediates_only=True)  # type: ignore[operator]
    if min(maps[-1].shape[2:]) < LEAST_PLACES:
        stride = -(-height // maps[-1].shape[2])
        raise ConfigError(
            f"features of {config.backbone} need images of at least {LEAST_PLACES * stride} x {LEAST_PLACES * stride} "
            f"pixels, got {height} x {width}: choose a larger input size"
        )
    return [tuple(level.shape[1:]) for level in maps]


def concatenate_levels(features: Features) -> Float[Tensor, "batch all_channels rows columns"]:
    """All levels as one, each enlarged to the finest."""
    finest = features[0].shape[2:]
    return torch.cat([F.interpolate(level, finest, mode="bilinear") for level in features], dim=1)
