"""Features of a frozen pretrained backbone at several scales: what the detectors that don't look at pixels look at."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import gaussian_blur

from loupe.errors import ConfigError
from loupe.models.input_size import build_shapes, check_input_size
from loupe.models.preprocess import Preprocess
from loupe.models.weights import depends_on_size

LEVELS = [-4, -3, -2]  # of a convolutional network the strides 4, 8 and 16: the coarsest can't see what is small
LEAST_PLACES = 2  # rows and columns of the coarsest level
# How many times smaller the second view may be, and how many rows and columns that must leave. At a quarter of 256
# pixels and more, maps of painted defects and of cracks in roads had a pixel AUROC of 0.878, at half 0.868, with both
# 0.880 and more time; scores were the same. At a quarter of 128 pixels maps are too coarse.
SECOND_VIEWS = {4: 3, 2: LEAST_PLACES}

Shape = tuple[int, int, int]  # channels, rows, columns
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
    """uint8 images to features of the backbone's last levels but one, finest first.

    Each is averaged over its 3 x 3 neighbourhood, as in PatchCore (Roth et al., 2022, arXiv:2106.08265).

    `shapes` are the channels, rows and columns of each level. They begin with those of the images; where there is a
    second view, as many follow of the images made smaller, in which the same levels see more.
    """

    def __init__(self, config: FeatureConfig, backbone: nn.Module, reductions: Sequence[int] = (1,)) -> None:
        """Takes the backbone whole, and leaves out of it what comes after the last level.

        Args:
            reductions: how many times smaller each view is than the images.

        Raises:
            ConfigError: if the input is too small, or the backbone gives no features at several levels.
        """
        super().__init__()
        channels = len(config.mean)
        self.preprocess = Preprocess(config.crop, config.size, channels, config.mean, config.std)
        self.reductions = reductions
        self.shapes = measure_levels(config, reductions)
        self.levels = _prune(backbone)
        self.backbone = backbone.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    @property
    def device(self) -> torch.device:
        """Where images must lie."""
        return self.preprocess.mean.device

    def train(self, mode: bool = True) -> "FeatureExtractor":
        """The backbone stays frozen: normalisation keeps its own statistics."""
        return super().train(False)

    def forward(self, images: UInt8[Tensor, "batch channels height width"]) -> Features:
        inputs = self.preprocess(images)
        views = [inputs if reduction == 1 else F.avg_pool2d(inputs, reduction) for reduction in self.reductions]
        levels = [level for view in views for level in _run(self.backbone, view, self.levels)]
        return [F.avg_pool2d(level, 3, stride=1, padding=1, count_include_pad=False) for level in levels]


def _prune(backbone: nn.Module) -> list[int]:
    """Cut off what comes after the last of LEVELS; their positions among all levels."""
    levels: list[int] = backbone.prune_intermediate_layers(LEVELS, prune_head=True)  # type: ignore[operator]
    return levels


def _run(backbone: nn.Module, inputs: Tensor, levels: list[int]) -> list[Tensor]:
    maps: list[Tensor] = backbone.forward_intermediates(  # type: ignore[operator]
        inputs, indices=levels, intermediates_only=True
    )
    return maps


def measure_levels(config: FeatureConfig, reductions: Sequence[int] = (1,)) -> list[Shape]:
    """Channels, rows and columns of each level, finest first, one view after the other.

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
    levels = _prune(network)
    blanks = [torch.empty(1, channels, height // one, width // one, device="meta") for one in reductions]
    shapes = [tuple(level.shape[1:]) for blank in blanks for level in _run(network, blank, levels)]
    if min(shapes[-1][1:]) < LEAST_PLACES:
        least = LEAST_PLACES * -(-height // shapes[-1][1])
        raise ConfigError(
            f"features of {config.backbone} need images of at least {least} x {least} pixels, got {height} x {width}: "
            f"choose a larger input size"
        )
    return cast("list[Shape]", shapes)


def choose_reductions(config: FeatureConfig) -> list[int]:
    """The views of a detector that looks twice: the second a quarter of the size, or half where that is too small.

    There is one alone where half is too small, or the backbone takes one size.
    """
    if depends_on_size(config.backbone):
        return [1]
    least = min(measure_levels(config)[-1][1:])
    return [1, *[one for one, places in SECOND_VIEWS.items() if least >= places * one][:1]]


def concatenate_levels(features: Features) -> Float[Tensor, "batch all_channels rows columns"]:
    """All levels as one, each enlarged to the finest."""
    finest = features[0].shape[2:]
    return torch.cat([F.interpolate(level, finest, mode="bilinear") for level in features], dim=1)


def blur_maps(
    maps: Float[Tensor, "batch rows columns"], kernel: int, deviation: float
) -> Float[Tensor, "batch rows columns"]:
    """Each map blurred by a Gaussian, mirrored at its edges; `kernel`, odd, and `deviation` are in places.

    A map too small for the kernel gets the largest that fits.
    """
    size = [min(kernel, 2 * places - 1) for places in reversed(maps.shape[1:])]  # width comes first
    blurred: Tensor = gaussian_blur(maps[:, None], size, [deviation] * 2)
    return blurred[:, 0]
