"""PaDiM: a Gaussian of the features at each place (Defard et al., 2021, arXiv:2011.08785)."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loupe.models.detectors.base import FeatureDetector
from loupe.models.detectors.feature_autoencoder import Moments
from loupe.models.detectors.features import FeatureConfig, Features, blur_maps, concatenate_levels

# As in the paper: channels drawn at random, and what is added to each variance.
NUM_CHANNELS, RIDGE = 100, 0.01
BLUR_PLACES, BLUR_KERNEL = 1.0, 9


class Padim(FeatureDetector):
    """The map is the Mahalanobis distance of each place to its own Gaussian, the score the largest of an image."""

    name = "padim"
    least_images = 10

    chosen: Tensor
    mean: Tensor
    whitening: Tensor

    def __init__(self, config: FeatureConfig, backbone: nn.Module) -> None:
        super().__init__(config, backbone)
        self.num_channels = sum(channels for channels, _, _ in self.extractor.shapes)
        _, rows, columns = self.extractor.shapes[0]
        num_chosen = min(NUM_CHANNELS, self.num_channels)
        self.register_buffer("chosen", torch.arange(num_chosen))
        self.register_buffer("mean", torch.zeros(rows * columns, num_chosen))
        self.register_buffer("whitening", torch.zeros(rows * columns, num_chosen, num_chosen))

    @torch.no_grad()
    def fit_features(self, batches: Iterable[Features], generator: torch.Generator, most_bytes: int) -> None:
        """Sums alone are kept."""
        device, moments = self.extractor.device, Moments()
        self.chosen = torch.randperm(self.num_channels, generator=generator)[: len(self.chosen)].to(device)
        for features in batches:
            moments.add(self._select(features).transpose(0, 1))
        self.mean = moments.compute_mean().squeeze(1)
        covariance = moments.pop_covariance().mul_(moments.count / (moments.count - 1))
        ridge = RIDGE * torch.eye(len(self.chosen), device=device)
        factor = torch.linalg.cholesky(covariance + ridge)
        identity = torch.eye(len(self.chosen), device=device)
        self.whitening.copy_(torch.linalg.solve_triangular(factor, identity, upper=False))  # row by row, read fastest

    def _select(self, features: Features) -> Float[Tensor, "batch num_places channels"]:
        levels = concatenate_levels(features).index_select(1, self.chosen)
        return levels.flatten(2).transpose(1, 2)

    def score_features(self, features: Features) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch rows columns"]]:
        whitened = torch.einsum("pcd,npd->npc", self.whitening, self._select(features) - self.mean)
        distances = whitened.square().sum(dim=2).sqrt().unflatten(1, features[0].shape[2:])
        maps = blur_maps(distances, BLUR_KERNEL, BLUR_PLACES)
        return maps.amax(dim=(1, 2)), maps
