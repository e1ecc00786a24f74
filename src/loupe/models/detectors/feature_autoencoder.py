"""The linear denoising autoencoder of a frozen backbone's features, one for each place, fitted in closed form.

Of features f with mean m and covariance S, to which noise of covariance N is added, the best linear reconstruction is
f - N (S + N)^-1 (f - m): the Wiener filter. What it leaves of f, measured against the noise, is the energy
(f - m)' (S + N)^-1 (f - m). So the error forgives what normal images vary in, and weighs all else by how rare it is.
To look for errors of rebuilt features is after FRE (Ndiour et al., 2022), to do so at each place by itself after PaDiM
(Defard et al., 2021, arXiv:2011.08785).
"""

import math
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import gaussian_blur

from loupe.models.detectors.base import Batches, FeatureDetector
from loupe.models.detectors.features import FeatureConfig, Features, Shape, concatenate_levels

T = TypeVar("T")

MOST_CHANNELS = 180  # more are drawn from: each place keeps a square matrix of them
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
    place borrows from the others.
    """

    chosen: Tensor
    mean: Tensor
    whitening: Tensor

    def __init__(self, shapes: list[Shape]) -> None:
        """Its places are those of the second of these levels."""
        super().__init__()
        self.num_channels = sum(channels for channels, _, _ in shapes)
        self.places = shapes[1][1:]
        num_places, num_chosen = math.prod(self.places), min(MOST_CHANNELS, self.num_channels)
        self.register_buffer("chosen", torch.arange(num_chosen))
        self.register_buffer("mean", torch.zeros(num_places, 1, num_chosen))
        self.register_buffer("whitening", torch.zeros(num_places, num_chosen, num_chosen))

    def draw_channels(self, generator: torch.Generator) -> None:
        drawn = torch.randperm(self.num_channels, generator=generator)[: len(self.chosen)]
        self.chosen = drawn.to(self.mean.device)

    def fit(self, moments: "Moments") -> None:
        """To those of what it selects."""
        self.mean = moments.compute_mean()
        whitening = compute_whitening(moments.pop_covariance(), NOISE_IMAGES / moments.count)
        self.whitening.copy_(whitening)  # row by row, as they are read fastest

    def select(self, features: Features) -> Float[Tensor, "num_places batch channels"]:
        """What it looks at of the view's features."""
        finest = F.adaptive_avg_pool2d(features[0], self.places)
        levels = concatenate_levels([finest, *features[1:]]).index_select(1, self.chosen)
        return levels.flatten(2).permute(2, 0, 1).contiguous()

    def forward(self, features: Features) -> Float[Tensor, "batch rows columns"]:
        """The error of each place."""
        whitened = self.whitening @ (self.select(features) - self.mean).mT
        errors: Tensor = whitened.square().sum(dim=1).T.unflatten(1, self.places)
        return errors


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
    def fit_features(self, batches: Batches, generator: torch.Generator) -> None:
        """One pass."""
        for wiener in self.filters:
            wiener.draw_channels(generator)  # type: ignore[operator]
        moments = [Moments() for _ in self.filters]
        for features in batches():
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
        return top, gaussian_blur(errors[:, None], [BLUR_KERNEL] * 2, [BLUR_PLACES] * 2)[:, 0]


def compute_whitening(
    covariance: Float[Tensor, "num_places channels channels"], noise: float
) -> Float[Tensor, "num_places channels channels"]:
    """The inverse Cholesky factor of each place's covariance with the noise added, a share of the variance.

    The covariance is changed in place: there is seldom room for two.
    """
    identity = torch.eye(covariance.shape[1], device=covariance.device)
    usual = covariance.mean(dim=0)
    variance = usual.trace() / len(usual)
    ridge = RIDGE * torch.where(variance > 0, variance, 1) * identity
    inverse = torch.linalg.inv((usual + ridge).double()).float()
    strength = torch.einsum("pcd,dc->p", covariance, inverse) / len(usual)
    covariance += noise * strength.clamp(min=LEAST_NOISE)[:, None, None] * usual + ridge
    whitening: Tensor = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), identity, upper=False)
    return whitening
