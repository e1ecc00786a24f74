"""The linear denoising autoencoder of a frozen backbone's features, one for each place, fitted in closed form.

Of features f with mean m and covariance S, to which noise of covariance N is added, the best linear reconstruction is
f - N (S + N)^-1 (f - m): the Wiener filter. What it leaves of f, measured against the noise, is the energy
(f - m)' (S + N)^-1 (f - m). So the error forgives what normal images vary in, and weighs all else by how rare it is.
To look for errors of rebuilt features is after FRE (Ndiour et al., 2022), to do so at each place by itself after PaDiM
(Defard et al., 2021, arXiv:2011.08785).
"""

import math
from collections.abc import Iterable
from typing import TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from loupe.models.detectors.base import FeatureDetector
from loupe.models.detectors.features import FeatureConfig, Features, Shape, blur_maps, concatenate_levels

T = TypeVar("T")

MOST_CHANNELS = 180  # more are drawn from: of each place a square matrix of them is summed up
# At each place; what they leave is taken to vary alike. With all 176, AUROC is higher by 0.002 on painted defects and
# cracks in roads, lower by 0.001 on one-class Fashion-MNIST, and nearly three times as much must be read for an image
# alone.
NUM_COMPONENTS = 64
PLACES_AT_ONCE = 128
RIDGE = 1e-4  # of the mean variance, for channels that never vary; rounding to float32 is below it
# Chosen on normal images with synthetic defects, none of them of a test set.
NOISE_IMAGES = 30  # at each place, the noise weighs as much as so many of its images
LEAST_NOISE = 0.5  # of a usual place's, where normal images are all alike
COARSE_WEIGHT = 0.5  # of the errors of the smaller view, where large defects are found and small ones lost
TOP_PLACES = 4  # of an image: the largest error alone is noisy, the mean of many loses small defects
BLUR_PLACES, BLUR_KERNEL = 1.0, 5


class WienerFilter(nn.Module):
    """The filter of each place of one view.

    The noise varies as all places do together, as strongly as the place itself: what its few images can't show, a
    place borrows from the others. With features in the units of the noise, the covariance of a place is kept as its
    principal components and one variance for all that they leave (Tipping and Bishop, 1999).
    """

    chosen: Tensor
    mean: Tensor
    whitening: Tensor
    components: Tensor
    weight: Tensor

    def __init__(self, shapes: list[Shape]) -> None:
        """Its places are those of the second of these levels."""
        super().__init__()
        self.num_channels = sum(channels for channels, _, _ in shapes)
        self.places = shapes[1][1:]
        num_places, num_chosen = math.prod(self.places), min(MOST_CHANNELS, self.num_channels)
        self.register_buffer("chosen", torch.arange(num_chosen))
        self.register_buffer("mean", torch.zeros(num_places, 1, num_chosen))
        self.register_buffer("whitening", torch.zeros(num_chosen, num_chosen))
        self.register_buffer("components", torch.zeros(num_places, num_chosen, min(NUM_COMPONENTS, num_chosen)))
        self.register_buffer("weight", torch.zeros(num_places))

    def draw_channels(self, generator: torch.Generator) -> None:
        drawn = torch.randperm(self.num_channels, generator=generator)[: len(self.chosen)]
        self.chosen = drawn.to(self.mean.device)

    def fit(self, moments: "Moments") -> None:
        """To those of what it selects."""
        self.mean, covariance = moments.compute_mean(), moments.pop_covariance()
        self.whitening = whitening = compute_whitening(covariance.mean(dim=0))
        noise, num_components = NOISE_IMAGES / moments.count, self.components.shape[2]
        parts = [
            compute_components(whitening @ places @ whitening.T, noise, num_components)
            for places in covariance.split(PLACES_AT_ONCE)
        ]
        self.components, self.weight = (torch.cat(part) for part in zip(*parts, strict=True))

    def select(self, features: Features) -> Float[Tensor, "num_places batch channels"]:
        """What it looks at of the view's features."""
        finest = F.adaptive_avg_pool2d(features[0], self.places)
        levels = concatenate_levels([finest, *features[1:]]).index_select(1, self.chosen)
        return levels.flatten(2).permute(2, 0, 1).contiguous()

    def forward(self, features: Features) -> Float[Tensor, "batch rows columns"]:
        """The error of each place."""
        whitened = (self.select(features) - self.mean) @ self.whitening.T
        forgiven = (whitened @ self.components).square().sum(dim=2)
        errors = self.weight[:, None] * whitened.square().sum(dim=2) - forgiven
        return cast("Tensor", errors.clamp(min=0).T.unflatten(1, self.places))


class Moments:
    """Mean and covariance of each place, from batches that come once.

    The sums are in float32, as they are the largest thing in memory; those of differences to the mean of the first
    batch keep their digits.
    """

    def __init__(self) -> None:
        self.count = 0

    def add(self, places: Float[Tensor, "num_places batch channels"]) -> None:
        if self.count == 0:
            self.start = places.mean(dim=1, keepdim=True)
            self.total, self.outer = torch.zeros_like(self.start), torch.zeros_like(self.start.mT @ self.start)
        differences = places - self.start
        self.count += places.shape[1]
        self.total += differences.sum(dim=1, keepdim=True)
        self.outer += differences.mT @ differences

    def compute_mean(self) -> Float[Tensor, "num_places 1 channels"]:
        return self.start + self.total / self.count

    def pop_covariance(self) -> Float[Tensor, "num_places channels channels"]:
        """Can be called once: it takes the place of the sums, as there is seldom room for two."""
        mean = self.total / self.count
        return self.outer.div_(self.count).sub_(mean.mT @ mean)


class FeatureAutoencoder(FeatureDetector):
    """The map is the square root of each place's error, the views' added up; the score the mean of the largest."""

    name = "feature_autoencoder"
    least_images = 10
    looks_twice = True

    def __init__(self, config: FeatureConfig, backbone: nn.Module) -> None:
        super().__init__(config, backbone)
        self.filters = nn.ModuleList(map(WienerFilter, self._split(self.extractor.shapes)))

    def _split(self, levels: list[T]) -> list[list[T]]:
        """Those of each view."""
        num_levels = len(levels) // len(self.extractor.reductions)
        return [levels[start : start + num_levels] for start in range(0, len(levels), num_levels)]

    @torch.no_grad()
    def fit_features(self, batches: Iterable[Features], generator: torch.Generator, most_bytes: int) -> None:
        """Sums alone are kept."""
        for wiener in self.filters:
            wiener.draw_channels(generator)  # type: ignore[operator]
        moments = [Moments() for _ in self.filters]
        for features in batches:
            for wiener, view, sums in zip(self.filters, self._split(features), moments, strict=True):
                sums.add(wiener.select(view))  # type: ignore[operator]
        for wiener, sums in zip(self.filters, moments, strict=True):
            wiener.fit(sums)  # type: ignore[operator]

    def score_features(self, features: Features) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch rows columns"]]:
        energy, *coarse = (wiener(view) for wiener, view in zip(self.filters, self._split(features), strict=True))
        for errors in coarse:
            enlarged = F.interpolate(errors[:, None], energy.shape[1:], mode="bilinear")[:, 0]
            energy = energy + COARSE_WEIGHT * enlarged
        errors = energy.sqrt()
        top = errors.flatten(1).topk(min(TOP_PLACES, errors[0].numel())).values.mean(dim=1)
        return top, blur_maps(errors, BLUR_KERNEL, BLUR_PLACES)


def compute_whitening(covariance: Float[Tensor, "channels channels"]) -> Float[Tensor, "channels channels"]:
    """What gives features of this covariance unit variance: its inverse Cholesky factor."""
    identity = torch.eye(len(covariance), device=covariance.device)
    variance = covariance.trace() / len(covariance)
    ridge = RIDGE * torch.where(variance > 0, variance, 1) * identity
    factor = torch.linalg.cholesky((covariance + ridge).double())
    whitening: Tensor = torch.linalg.solve_triangular(factor, identity.double(), upper=False)
    return whitening.float()


def compute_components(
    covariance: Float[Tensor, "num_places channels channels"], noise: float, num_components: int
) -> tuple[Float[Tensor, "num_places channels num_components"], Float[Tensor, " num_places"]]:
    """What gives the energy of f as weight |f|^2 - |components' f|^2.

    Args:
        covariance: in units in which the noise is alike in all directions.
        noise: its share of a place's mean variance.
    """
    added = noise * covariance.diagonal(dim1=1, dim2=2).mean(dim=1).clamp(min=LEAST_NOISE)
    variances, directions = torch.linalg.eigh(covariance)  # the largest last
    left, kept = variances.clamp(min=0).tensor_split([-num_components], dim=1)
    weight = 1 / (left.sum(dim=1) / max(1, left.shape[1]) + added)
    forgiven = weight[:, None] - 1 / (kept + added[:, None])
    return directions[:, :, -num_components:] * forgiven.clamp(min=0).sqrt()[:, None], weight
