"""PatchCore's idea: the distance to the nearest of many normal patches (Roth et al., 2022, arXiv:2106.08265).

PatchCore's greedy search, which takes most of its time, is made among patches drawn at random.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.transforms.v2.functional import gaussian_blur

from loupe.models.detectors.base import Batches, FeatureDetector
from loupe.models.detectors.features import FeatureConfig, Features, concatenate_levels

LEVELS = slice(1, 3)  # strides 8 and 16, as in the paper
# On defects painted on normal tiles, image AUROC is higher by 0.05 than with a bank drawn at random, for 9 s of fit.
BANK_SIZE, NUM_CANDIDATES = 4096, 20_480
BLUR_PLACES, BLUR_KERNEL = 0.5, 5


class KnnPatches(FeatureDetector):
    """The map is the distance of each place to the nearest patch of the bank, the score the largest of an image."""

    name = "knn_patches"

    bank: Tensor

    def __init__(self, config: FeatureConfig, backbone: nn.Module) -> None:
        super().__init__(config, backbone)
        channels = sum(channels for channels, _, _ in self.extractor.shapes[LEVELS])
        self.register_buffer("bank", torch.zeros(BANK_SIZE, channels))

    @torch.no_grad()
    def fit_features(self, batches: Batches, generator: torch.Generator) -> None:
        """One pass: each patch gets a random number, and those with the smallest are the bank's candidates."""
        candidates, keys = self.bank[:0], torch.empty(0, device=self.bank.device)
        for features in batches():
            levels = concatenate_levels(features[LEVELS])
            patches = levels.permute(0, 2, 3, 1).flatten(0, 2)
            drawn = torch.rand(len(patches), generator=generator).to(keys.device)
            keys, order = torch.cat([keys, drawn]).sort()
            keys, candidates = keys[:NUM_CANDIDATES], torch.cat([candidates, patches])[order[:NUM_CANDIDATES]]
        self.bank = choose_far_apart(candidates, BANK_SIZE)

    def score_features(self, features: Features) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch rows columns"]]:
        levels = concatenate_levels(features[LEVELS])
        patches = levels.flatten(2).transpose(1, 2)
        squares = patches.square().sum(dim=2, keepdim=True) + self.bank.square().sum(dim=1)
        nearest = (squares - 2 * patches @ self.bank.T).amin(dim=2).clamp(min=0).sqrt()  # rounding may fall below 0
        maps = gaussian_blur(nearest.unflatten(1, levels.shape[2:])[:, None], [BLUR_KERNEL] * 2, [BLUR_PLACES] * 2)[
            :, 0
        ]
        return nearest.amax(dim=1), maps


def choose_far_apart(
    points: Float[Tensor, "num_points num_values"], number: int
) -> Float[Tensor, "{number} num_values"]:
    """The first point, and then each time the one farthest from all that are chosen, so that rare ones are among them.

    It is the greedy solution of the k-center problem (Gonzalez, 1985). Where there are fewer points, some are repeated.
    """
    squares = points.square().sum(dim=1)
    nearest = torch.full_like(squares, torch.inf)
    chosen = [torch.zeros((), dtype=torch.int64, device=points.device)]
    for _ in range(number - 1):
        latest = chosen[-1]
        nearest = torch.minimum(nearest, squares + squares[latest] - 2 * points @ points[latest])
        chosen.append(nearest.argmax())
    return points[torch.stack(chosen)]
