"""PaDiM: a Gaussian of the features at each place (Defard et al., 2021, arXiv:2011.08785)."""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.transforms.v2.functional import gaussian_blur

from loupe.models.detectors.base import FeatureDetector
from loupe.models.detectors.features import FeatureConfig, Features, concatenate_levels

MOST_CHANNELS = 100  # drawn at random, as in the paper
RIDGE = 0.01  # added to each variance, as in the paper
BLUR_KERNEL = 9


class Padim(FeatureDetector):
    """The map is the Mahalanobis distance of each place to its own Gaussian; the score is the largest distance."""

    name = "padim"
    least_images = 10

    channels: Tensor
    mean: Tensor
    whitening: Tensor

    def __init__(self, config: FeatureConfig, backbone: nn.Module) -> None:
        super().__init__(config, backbone)
        total = sum(channels for channels, _, _ in self.extractor.shapes[:-1])
        _, rows, columns = self.extractor.shapes[0]
        kept = min(MOST_CHANNELS, total)
        self.register_buffer("channels", torch.arange(kept))
        self.register_buffer("mean", torch.zeros(rows * columns, kept))
        self.register_buffer("whitening", torch.zeros(rows * columns, kept, kept))
        self.num_channels = total
