"""The linear denoising autoencoder of a frozen backbone's features, one for each place, fitted in closed form.

Of features f with mean m and covariance S, to which noise of covariance N is added, the best linear reconstruction is
f - N (S + N)^-1 (f - m): the Wiener filter. What it leaves of f, measured against the noise, is the energy
(f - m)' (S + N)^-1 (f - m). So the error forgives what normal images vary in, and weighs all else by how rare it is.
To look for errors of rebuilt features is after FRE (Ndiour et al., 2022), to do so at each place by itself after PaDiM
(Defard et al., 2021, arXiv:2011.08785).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import gaussian_blur

from loupe.models.detectors.base import Batches, FeatureDetector
from loupe.models.detectors.features import FeatureConfig, Features, concatenate_levels

NUM_LEVELS = 3  # strides 4, 8 and 16: the coarsest can't see what is small
MOST_CHANNELS = 180  # more are drawn from: each place keeps a square matrix of them
RIDGE = 1e-4  # of the mean variance, for channels that never vary; rounding to float32 is below it
# Chosen on normal images with synthetic defects, none of them of a test set.
NOISE_IMAGES = 30  # at each place, the noise weighs as much as so many of its images
LEAST_NOISE = 0.5  # of a usual place's, where normal images are all alike
TOP_PLACES = 4  # of an image: the largest error alone is noisy, the mean of many loses small defects
BLUR_PLACES, BLUR_KERNEL = 1.0, 5


class FeatureAutoencoder(FeatureDetector):
    """The map is the square root of each place's error, the anomaly score the mean of an image's largest.

    The noise varies as all places do together, as strongly as the place itself: what its few images can't show, a
    place borrows from the others.
    """

    name = "feature_autoencoder"
    least_images = 10

    chosen: Tensor
    mean: Tensor
    whitening: Tensor

    def __init__(self, config: FeatureConfig, backbone: nn.Module) -> None:
        super().__init__(config, backbone)
        self.num_channels = sum(channels for channels, _, _ in self.extractor.shapes[:NUM_LEVELS])
        _, rows, columns = self.extractor.shapes[1]
        self.places = rows, columns
        num_chosen = min(MOST_CHANNELS, self.num_channels)
        self.register_buffer("chosen", torch.arange(num_chosen))
        self.register_buffer("mean", torch.zeros(rows * columns, num_chosen, 1))
        self.register_buffer("whitening", torch.zeros(rows * columns, num_chosen, num_chosen))

    @torch.no_grad()
    def fit_features(self, batches: Batches, generator: torch.Generator) -> None:
        """One pass, but that the first images are looked at twice.

        The sums are in float32, as they are the largest thing in memory; those of differences to the mean of the first
        images keep their digits.
        """
        self.chosen = torch.randperm(self.num_channels, generator=generator)[: len(self.chosen)].to(self.mean.device)
        start = self._select(next(iter(batches()))).mean(dim=2, keepdim=True)
        count, total, outer = 0, torch.zeros_like(self.mean), torch.zeros_like(self.whitening)
        for features in batches():
            places = self._select(features) - start
            count += places.shape[2]
            total += places.sum(dim=2, keepdim=True)
            outer += places @ places.transpose(1, 2)
        total /= count
        self.mean = start + total
        covariance = outer.div_(count).sub_(total @ total.transpose(1, 2))
        self.whitening = compute_whitening(covariance, NOISE_IMAGES / count)

    def _select(self, features: Features) -> Float[Tensor, "num_places channels batch"]:
        finest = F.adaptive_avg_pool2d(features[0], self.places)
        levels = concatenate_levels([finest, *features[1:NUM_LEVELS]]).index_select(1, self.chosen)
        return levels.flatten(2).permute(2, 1, 0)

    def score_features(self, features: Features) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch rows columns"]]:
        whitened = self.whitening @ (self._select(features) - self.mean)
        errors = whitened.square().sum(dim=1).sqrt().T
        top = errors.topk(min(TOP_PLACES, errors.shape[1])).values.mean(dim=1)
        maps = errors.unflatten(1, self.places)
        blurred = gaussian_blur(maps[:, None], [BLUR_KERNEL] * 2, [BLUR_PLACES] * 2)
        return top, blurred[:, 0]


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
