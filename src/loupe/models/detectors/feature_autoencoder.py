"""The linear autoencoder of a frozen backbone's features, at several scales, fitted in closed form.

For squared errors the best linear autoencoder is the projection on the first principal components (Baldi and Hornik,
"Neural networks and principal component analysis", Neural Networks 2, 1989). What normal features don't span is what
it can't rebuild; to look for that in deep features is after FRE (Ndiour et al., 2022).
"""

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import gaussian_blur

from loupe.models.detectors.base import Batches, FeatureDetector
from loupe.models.detectors.features import FeatureConfig, Features
from loupe.models.detectors.moments import Moments, flatten_places

# Chosen on normal images with synthetic defects, none of them of a test set.
VARIANCE_KEPT = 0.98  # with 0.90 much of a fine texture is an error, with all of it nothing is
TOP_PART = 0.03  # of an image's places: the largest error alone is noisy, the mean of all loses small defects
FLOOR = 0.25  # of the variance of all errors, for places where normal images are all alike
BLUR_PLACES, BLUR_KERNEL = 2.0, 9


class LinearAutoencoder(nn.Module):
    """Of one level: features to as many principal components as hold VARIANCE_KEPT of the variance, and back.

    Errors are standardised by what they are at the same place of normal images that it was not fitted to
    (`error_mean`, `error_std`), and their top means by those of these images (`top_mean`, `top_std`).
    """

    mean: Tensor
    components: Tensor
    is_kept: Tensor
    error_mean: Tensor
    error_std: Tensor
    top_mean: Tensor
    top_std: Tensor

    def __init__(self, channels: int, rows: int, columns: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("components", torch.eye(channels))
        self.register_buffer("is_kept", torch.zeros(channels, dtype=torch.bool))
        self.register_buffer("error_mean", torch.zeros(rows, columns))
        self.register_buffer("error_std", torch.ones(rows, columns))
        self.register_buffer("top_mean", torch.zeros(()))
        self.register_buffer("top_std", torch.ones(()))

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
        """0 is the mean of normal images at that place, 1 their standard deviation above it."""
        return (errors - self.error_mean) / self.error_std

    def compute_score(self, errors: Float[Tensor, "batch rows columns"]) -> Float[Tensor, " batch"]:
        """0 is the mean of normal images, 1 their standard deviation above it."""
        return (compute_top(self.standardise(errors)) - self.top_mean) / self.top_std


def compute_top(errors: Float[Tensor, "batch rows columns"]) -> Float[Tensor, " batch"]:
    """The mean of an image's largest errors, TOP_PART of its places and at least one."""
    places = errors.flatten(1)
    return places.topk(max(1, round(TOP_PART * places.shape[1]))).values.mean(dim=1)


class FeatureAutoencoder(FeatureDetector):
    """The anomaly score is the mean of the levels' scores, the map the mean of their errors in standard deviations.

    The finest level is left out of the score, where it is mostly noise, and the coarsest out of the map, as it can't
    say where. The map keeps the errors' means: where they are high, as on an object and not beside it, defects are.
    """

    name = "feature_autoencoder"
    least_images = 10

    def __init__(self, config: FeatureConfig, backbone: nn.Module) -> None:
        super().__init__(config, backbone)
        self.autoencoders = nn.ModuleList(LinearAutoencoder(*shape) for shape in self.extractor.shapes)

    @property
    def _autoencoders(self) -> list[LinearAutoencoder]:
        return cast("list[LinearAutoencoder]", list(self.autoencoders))

    @torch.no_grad()
    def fit_features(self, batches: Batches, generator: torch.Generator) -> None:
        """Three passes: principal components, errors, and top means of errors.

        Errors of images that were fitted to are too small, the more so the coarser the level, which would then
        outweigh the others. So each half of the images is measured by components of the other.
        """
        halves = self._collect_moments(batches)
        for autoencoder, first, second in zip(self._autoencoders, *halves, strict=True):
            autoencoder.fit(first + second)
        crossed = [self._build(moments) for moments in reversed(halves)]
        self._standardise_errors(crossed, batches)
        self._standardise_scores(crossed, batches)

    def _collect_moments(self, batches: Batches) -> list[list[Moments]]:
        halves = [[Moments(c, self.extractor.device) for c, _, _ in self.extractor.shapes] for _ in range(2)]
        for features, is_second in _halve(batches()):
            for half, chosen in zip(halves, (~is_second, is_second), strict=True):
                for moments, level in zip(half, features, strict=True):
                    moments.add(flatten_places(level[chosen]))
        return halves

    def _build(self, half: list[Moments]) -> list[LinearAutoencoder]:
        pairs = zip(self.extractor.shapes, half, strict=True)
        return [LinearAutoencoder(*shape).to(self.extractor.device).fit(moments) for shape, moments in pairs]

    def _standardise_errors(self, crossed: list[list[LinearAutoencoder]], batches: Batches) -> None:
        count, device = 0, self.extractor.device
        sums = [torch.zeros(2, *shape[1:], dtype=torch.float64, device=device) for shape in self.extractor.shapes]
        for errors in _compute_unseen_errors(crossed, batches):
            count += len(errors[0])
            for total, level in zip(sums, errors, strict=True):
                total += torch.stack([level.double(), level.double().square()]).sum(dim=1)
        for autoencoder, total in zip(self._autoencoders, sums, strict=True):
            mean, square = F.avg_pool2d(total / count, 3, stride=1, padding=1, count_include_pad=False)
            variance = (square - mean.square()).clamp(min=0)
            variance_of_all = square.mean() - mean.mean().square()
            autoencoder.error_mean = mean.float()
            autoencoder.error_std = _get_std(variance + FLOOR * variance_of_all)

    def _standardise_scores(self, crossed: list[list[LinearAutoencoder]], batches: Batches) -> None:
        tops = [Moments(1, self.extractor.device) for _ in self.autoencoders]
        for errors in _compute_unseen_errors(crossed, batches):
            for autoencoder, top, level in zip(self._autoencoders, tops, errors, strict=True):
                top.add(compute_top(autoencoder.standardise(level))[:, None])
        for autoencoder, top in zip(self._autoencoders, tops, strict=True):
            autoencoder.top_mean = top.mean[0].float()
            autoencoder.top_std = _get_std(top.covariance[0, 0])

    def score_features(self, features: Features) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch rows columns"]]:
        levels = list(zip(self._autoencoders, features, strict=True))
        errors = [(autoencoder, autoencoder(level)) for autoencoder, level in levels]
        scores = [autoencoder.compute_score(error) for autoencoder, error in errors[1:]]
        maps = [(error / autoencoder.error_std)[:, None] for autoencoder, error in errors[:-1]]
        maps = [F.interpolate(level, maps[0].shape[2:], mode="bilinear") for level in maps]
        blurred = gaussian_blur(torch.stack(maps).mean(dim=0), [BLUR_KERNEL] * 2, [BLUR_PLACES] * 2)
        return torch.stack(scores).mean(dim=0), blurred[:, 0]


def _halve(batches: Iterable[Features]) -> Iterator[tuple[Features, Bool[Tensor, " batch"]]]:
    """Every second image belongs to the second half, however the images were cut into batches."""
    start = 0
    for features in batches:
        positions = torch.arange(start, start + len(features[0]), device=features[0].device)
        start += len(positions)
        yield features, positions % 2 == 1


def _compute_unseen_errors(
    crossed: list[list[LinearAutoencoder]], batches: Batches
) -> Iterator[list[Float[Tensor, "batch _rows _columns"]]]:
    """Each level's errors of each half under the autoencoders that were fitted to the other."""
    for features, is_second in _halve(batches()):
        for half, chosen in zip(crossed, (~is_second, is_second), strict=True):
            yield [autoencoder(level[chosen]) for autoencoder, level in zip(half, features, strict=True)]


def _get_std(variance: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """1 where all values are alike."""
    return torch.where(variance > 0, variance, torch.ones_like(variance)).sqrt().float()
