"""The linear autoencoder of a frozen backbone's features, at several scales, fitted in closed form.

For squared errors the best linear autoencoder is the projection on the first principal components (Baldi and Hornik,
"Neural networks and principal component analysis", Neural Networks 2, 1989). What normal features don't span is what
it can't rebuild; to look for that in deep features is after FRE (Ndiour et al., 2022).
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import gaussian_blur

from loupe.models.detectors.base import FeatureDetector
from loupe.models.detectors.features import FeatureConfig, Features
from loupe.models.detectors.moments import Moments, flatten_places

# Chosen on normal images with synthetic defects, none of them of a test set.
VARIANCE_KEPT = 0.98  # 0.90 rebuilds too little of fine textures, 0.99 rebuilds some defects
TOP_PART = 0.03  # of an image's places: the largest error alone is noisy, the mean of all loses small defects
BLUR_PLACES, BLUR_KERNEL = 2.0, 9


class LinearAutoencoder(nn.Module):
    """Of one level: features to as many principal components as hold VARIANCE_KEPT of the variance, and back.

    The errors and their top means are standardised by `error_mean`, `error_std`, `top_mean` and `top_std`: those of
    normal images that it has not seen.
    """

    mean: Tensor
    components: Tensor
    is_kept: Tensor
    error_mean: Tensor
    error_std: Tensor
    top_mean: Tensor
    top_std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("components", torch.eye(channels))
        self.register_buffer("is_kept", torch.zeros(channels, dtype=torch.bool))
        for name in ("error", "top"):
            self.register_buffer(f"{name}_mean", torch.zeros(()))
            self.register_buffer(f"{name}_std", torch.ones(()))

    def fit(self, moments: Moments) -> "LinearAutoencoder":
        """Take mean and principal components, the strongest first."""
        variances, components = torch.linalg.eigh(moments.covariance)
        variances = variances.flip(0).clamp(min=0)
        before = variances.cumsum(0) - variances
        self.mean = moments.mean.float()
        self.components = components.flip(1).float()
        self.is_kept = before < VARIANCE_KEPT * variances.sum()
        return self

    def encode(
        self, level: Float[Tensor, "batch channels rows columns"]
    ) -> Float[Tensor, "batch channels rows columns"]:
        """Coordinates along all components; those of `is_kept` are the code."""
        return F.conv2d(level - self.mean[:, None, None], self.components.T[:, :, None, None])

    def forward(self, level: Float[Tensor, "batch channels rows columns"]) -> Float[Tensor, "batch rows columns"]:
        """The squared error of each place's reconstruction: the part of it along the components that are left out."""
        residual = self.encode(level).square() * ~self.is_kept[:, None, None]
        return residual.sum(dim=1)

    def standardise(self, errors: Float[Tensor, "batch rows columns"]) -> Float[Tensor, "batch rows columns"]:
        """0 is the mean of normal places, 1 their standard deviation above it."""
        return (errors - self.error_mean) / self.error_std

    def compute_score(self, errors: Float[Tensor, "batch rows columns"]) -> Float[Tensor, " batch"]:
        """0 is the mean of normal images, 1 their standard deviation above it."""
        return (compute_top(errors) - self.top_mean) / self.top_std


def compute_top(errors: Float[Tensor, "batch rows columns"]) -> Float[Tensor, " batch"]:
    """The mean of an image's largest errors, TOP_PART of its places and at least one."""
    places = errors.flatten(1)
    return places.topk(max(1, round(TOP_PART * places.shape[1]))).values.mean(dim=1)


class FeatureAutoencoder(FeatureDetector):
    """The anomaly score is the mean of the levels' scores, the map the mean of their standardised errors.

    The finest level is left out of the score, as its errors are many and small over all of an image, and the coarsest
    out of the map, as it can't say where.
    """

    name = "feature_autoencoder"
    least_images = 10

    def __init__(self, config: FeatureConfig, backbone: nn.Module) -> None:
        super().__init__(config, backbone)
        self.autoencoders = nn.ModuleList(LinearAutoencoder(channels) for channels, _, _ in self.extractor.shapes)

    @torch.no_grad()
    def fit_features(self, batches: Callable[[], Iterable[Features]]) -> None:
        """Two passes: principal components of either half of the images and of both, then the errors of each half
        under the components of the other. Errors of images that were fitted to would be too small, the more so the
        coarser the level.
        """
        halves = self._collect_moments(batches)
        for index, (first, second) in enumerate(zip(*halves, strict=True)):
            self.autoencoders[index].fit(first + second)
        crossed = [[self._build(moments) for moments in half] for half in reversed(halves)]
        self._set_scales(crossed, batches)

    def _collect_moments(self, batches: Callable[[], Iterable[Features]]) -> list[list[Moments]]:
        halves = [[Moments(c, self.extractor.device) for c, _, _ in self.extractor.shapes] for _ in range(2)]
        for features, is_second in _halve(batches()):
            for half, chosen in zip(halves, (~is_second, is_second), strict=True):
                for moments, level in zip(half, features, strict=True):
                    moments.add(flatten_places(level[chosen]))
        return halves

    def _build(self, moments: Moments) -> LinearAutoencoder:
        return LinearAutoencoder(len(moments.total)).to(self.extractor.device).fit(moments)

    def _set_scales(
        self, crossed: list[list[LinearAutoencoder]], batches: Callable[[], Iterable[Features]]
    ) -> None:
        places = [Moments(1, self.extractor.device) for _ in self.autoencoders]
        tops = [Moments(1, self.extractor.device) for _ in self.autoencoders]
        for features, is_second in _halve(batches()):
            for half, chosen in zip(crossed, (~is_second, is_second), strict=True):
                for index, level in enumerate(features):
                    errors = half[index](level[chosen])
                    places[index].add(errors.reshape(-1, 1))
                    tops[index].add(compute_top(errors)[:, None])
        for autoencoder, place, top in zip(self.autoencoders, places, tops, strict=True):
            autoencoder.error_mean, autoencoder.error_std = _get_scale(place)
            autoencoder.top_mean, autoencoder.top_std = _get_scale(top)

    def score_features(self, features: Features) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch rows columns"]]:
        levels = list(zip(self.autoencoders, features, strict=True))
        errors = [autoencoder(level) for autoencoder, level in levels]
        pairs = list(zip(self.autoencoders, errors, strict=True))
        score = torch.stack([autoencoder.compute_score(error) for autoencoder, error in pairs[1:]]).mean(dim=0)
        maps = [autoencoder.standardise(error)[:, None] for autoencoder, error in pairs[:-1]]
        enlarged = [F.interpolate(level, maps[0].shape[2:], mode="bilinear") for level in maps]
        blurred = gaussian_blur(torch.stack(enlarged).mean(dim=0), [BLUR_KERNEL], [BLUR_PLACES])
        return score, blurred[:, 0]


def _halve(batches: Iterable[Features]) -> Iterator[tuple[Features, Bool[Tensor, " batch"]]]:
    """Every second image belongs to the second half, however the images were cut into batches."""
    start = 0
    for features in batches:
        positions = torch.arange(start, start + len(features[0]), device=features[0].device)
        start += len(positions)
        yield features, positions % 2 == 1


def _get_scale(moments: Moments) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of single values; 1 where all are alike."""
    variance = moments.covariance[0, 0]
    std = torch.where(variance > 0, variance, torch.ones_like(variance)).sqrt()
    return moments.mean[0].float(), std.float()
