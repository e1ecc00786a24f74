"""Reverse distillation: features of a frozen backbone, rebuilt level by level from a narrow code.

After Deng and Li, "Anomaly detection via reverse distillation from one-class embedding", CVPR 2022, arXiv:2201.10703.
Of the finest three levels a bottleneck makes one code at half the coarsest's scale, and a decoder, which was trained on
normal images alone, rebuilds the levels from it, the coarsest first.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from loupe.models.detectors.base import TrainedDetector
from loupe.models.detectors.features import FeatureConfig, FeatureExtractor, Features, Shape, blur_maps
from loupe.models.weights import build_backbone, build_options

MOST_CHANNELS = 256  # between the levels of the decoder: the levels of large backbones are rebuilt from fewer
BLUR_PLACES, BLUR_KERNEL = 1.0, 5  # the paper's 4 pixels at stride 4
TOP_PART = 0.01  # of an image's places; the paper's maximum was the noisier on normal images with synthetic defects


class Bottleneck(nn.Module):
    """Levels, finest first, to one code at half the scale of the coarsest."""

    def __init__(self, shapes: Sequence[Shape], code_channels: int) -> None:
        super().__init__()
        self.places = shapes[-1][1:]
        width = sum(channels for channels, _, _ in shapes)
        self.fuse = _convolve(width, code_channels, kernel=1)
        self.shrink = _convolve(code_channels, code_channels, kernel=3, stride=2)

    def forward(self, levels: Features) -> Float[Tensor, "batch code_channels code_rows code_columns"]:
        fused = torch.cat([F.adaptive_avg_pool2d(level, self.places) for level in levels], dim=1)
        code: Tensor = self.shrink(self.fuse(fused))
        return code


class Rebuild(nn.Module):
    """One step of the decoder: to the scale of a level, which a head of it rebuilds."""

    def __init__(self, inputs: int, shape: Shape) -> None:
        super().__init__()
        self.places = shape[1:]
        outputs = min(shape[0], MOST_CHANNELS)
        self.convolutions = nn.Sequential(_convolve(inputs, outputs, kernel=3), _convolve(outputs, outputs, kernel=3))
        self.head = nn.Conv2d(outputs, shape[0], 1)

    def forward(
        self, values: Float[Tensor, "batch inputs _rows _columns"]
    ) -> tuple[Float[Tensor, "batch outputs rows columns"], Float[Tensor, "batch channels rows columns"]]:
        """What the next step takes, and the level."""
        values = self.convolutions(F.interpolate(values, self.places, mode="bilinear"))
        return values, self.head(values)


def _convolve(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class DeepFeatureAutoencoder(TrainedDetector):
    """The map is the blurred sum of the levels' cosine distances to what was rebuilt, the score the mean of its top.

    Only the bottleneck and the decoder are trained.
    """

    name = "deep_feature_autoencoder"
    config_type = FeatureConfig

    def __init__(self, config: FeatureConfig, backbone: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.extractor = FeatureExtractor(config, backbone)
        shapes = self.extractor.shapes
        widths = [min(channels, MOST_CHANNELS) for channels, _, _ in shapes]
        code_channels = 2 * widths[-1]
        self.bottleneck = Bottleneck(shapes, code_channels)
        inputs = [*widths[1:], code_channels]
        steps = [Rebuild(*step) for step in zip(inputs, shapes, strict=True)]
        self.decoder = nn.ModuleList(reversed(steps))
        for part in (self.bottleneck, self.decoder):
            part.to(memory_format=torch.channels_last)

    @classmethod
    def build(cls, config: FeatureConfig, weights: str) -> "DeepFeatureAutoencoder":
        options = build_options(config.backbone, config.size, len(config.mean))
        return cls(config, build_backbone(config.backbone, weights, **options))

    def compute_distances(
        self, images: UInt8[Tensor, "batch channels height width"]
    ) -> list[Float[Tensor, "batch _rows _columns"]]:
        """Of each level, finest first: 1 - cosine similarity of a place's features to those rebuilt, in [0, 2]."""
        with torch.no_grad():
            levels = self.extractor(images)
        values, rebuilt = self.bottleneck(levels), []
        for step in self.decoder:
            values, level = step(values)
            rebuilt.append(level)
        pairs = zip(levels, reversed(rebuilt), strict=True)
        return [1 - F.cosine_similarity(level, other, dim=1) for level, other in pairs]

    def compute_losses(
        self, images: UInt8[Tensor, "batch channels height width"], progress: float
    ) -> dict[str, Float[Tensor, ""]]:
        return {"loss": torch.stack([level.mean() for level in self.compute_distances(images)]).mean()}

    def forward(
        self, images: UInt8[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch height width"]]:
        distances = [level[:, None] for level in self.compute_distances(images)]
        levels = [F.interpolate(level, distances[0].shape[2:], mode="bilinear") for level in distances]
        maps = blur_maps(torch.cat(levels, dim=1).sum(dim=1), BLUR_KERNEL, BLUR_PLACES)
        places = maps.flatten(1)
        top = places.topk(max(1, round(TOP_PART * places.shape[1]))).values
        return top.mean(dim=1), F.interpolate(maps[:, None], images.shape[2:], mode="bilinear")[:, 0]

    def embed(self, images: UInt8[Tensor, "batch channels height width"]) -> Float[Tensor, "batch num_values"]:
        """The code's mean over all places."""
        code: Tensor = self.bottleneck(self.extractor(images))
        return code.mean(dim=(2, 3))
