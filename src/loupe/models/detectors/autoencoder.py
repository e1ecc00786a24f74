"""The undercomplete convolutional autoencoder: what it can't rebuild was not among the normal images.

After Hinton and Salakhutdinov, "Reducing the dimensionality of data with neural networks", Science 313, 2006. It learns
by squared errors or by structural similarity (Wang et al., "Image quality assessment: from error visibility to
structural similarity", 2004; Bergmann et al., 2019, arXiv:1807.02011, for anomalies).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from loupe.errors import ConfigError
from loupe.models.detectors.base import TrainedDetector
from loupe.models.preprocess import Preprocess

STRIDE = 8
WINDOW = 11  # side of SSIM's window in pixels
LEAST_MULTISCALE_SIDE = 16 * WINDOW  # pixels: the coarsest of five scales has a sixteenth of them

ImageLoss = Literal["mse", "ssim", "ms_ssim"]


@dataclass(frozen=True)
class AutoencoderConfig:
    """All that it takes to make the network again.

    `crop` and `size` are (height, width) in pixels, `size` in multiples of STRIDE. The code has `latent_channels`
    values for each STRIDE x STRIDE pixels. `loss` is what training lowers: the mean squared error, or 1 - SSIM at one
    scale or at five.
    """

    channels: int
    width: int
    latent_channels: int
    crop: tuple[int, int]
    size: tuple[int, int]
    loss: ImageLoss = "mse"


class Autoencoder(TrainedDetector):
    """The score is the mean of the map: the reconstruction error of the image.

    The map is the squared error of each pixel with `mse`, and else 1 - SSIM at one scale, as five have no common map.
    """

    name = "autoencoder"
    config_type = AutoencoderConfig
    values_per_code: ClassVar[int] = 1  # what the encoder says of each value of the code

    def __init__(self, config: AutoencoderConfig) -> None:
        """Raises ConfigError if the input size is none that it takes."""
        super().__init__()
        _check_size(config)
        self.config = config
        narrow, middle, wide = config.width, 2 * config.width, 4 * config.width
        channels = config.channels
        self.preprocess = Preprocess(config.crop, config.size, channels, [0.0] * channels, [1.0] * channels)
        self.encoder = nn.Sequential(
            *_downsample(channels, narrow),
            *_downsample(narrow, middle),
            *_downsample(middle, wide),
            nn.Conv2d(wide, self.values_per_code * config.latent_channels, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(config.latent_channels, wide, 1),
            nn.ReLU(),
            *_upsample(wide, middle),
            *_upsample(middle, narrow),
            *_upsample(narrow, narrow),
            nn.Conv2d(narrow, channels, 3, padding=1),
            nn.Sigmoid(),
        )

    @classmethod
    def build(cls, config: AutoencoderConfig, weights: str) -> "Autoencoder":
        """There is no backbone, and `weights` mean nothing."""
        return cls(config)

    def encode(
        self, targets: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch latent_channels rows columns"]:
        """The code of images as the network sees them."""
        code: Tensor = self.encoder(targets)
        return code

    def reconstruct(
        self, images: UInt8[Tensor, "batch channels prepared_height prepared_width"]
    ) -> tuple[Float[Tensor, "batch channels height width"], Float[Tensor, "batch channels height width"]]:
        """The images as the network sees them, and their reconstructions; both in [0, 1]."""
        targets = self.preprocess(images)
        return targets, self.decoder(self.encode(targets))

    def compute_map(
        self,
        targets: Float[Tensor, "batch channels height width"],
        reconstructions: Float[Tensor, "batch channels height width"],
    ) -> Float[Tensor, "batch height width"]:
        """How badly each pixel is rebuilt, as the network sees it; 0 is a perfect reconstruction."""
        compute = compute_errors if self.config.loss == "mse" else compute_dissimilarities
        return compute(targets, reconstructions)

    def forward(
        self, images: UInt8[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch height width"]]:
        errors = self.compute_map(*self.reconstruct(images))
        return errors.mean(dim=(1, 2)), fit_maps(errors, images)

    def embed(self, images: UInt8[Tensor, "batch channels height width"]) -> Float[Tensor, "batch num_values"]:
        """The code."""
        return self.encode(self.preprocess(images)).flatten(1)

    def compute_losses(
        self, images: UInt8[Tensor, "batch channels height width"], progress: float
    ) -> dict[str, Float[Tensor, ""]]:
        return {"loss": self.compare(*self.reconstruct(images))}

    def compare(
        self,
        targets: Float[Tensor, "batch channels height width"],
        reconstructions: Float[Tensor, "batch channels height width"],
    ) -> Float[Tensor, ""]:
        """The loss of a batch; in float32, as variances of SSIM are small differences of large numbers."""
        with torch.autocast(targets.device.type, enabled=False):
            return LOSSES[self.config.loss](targets, reconstructions.float())


def _check_size(config: AutoencoderConfig) -> None:
    height, width = config.size
    if height % STRIDE or width % STRIDE:
        raise ConfigError(f"the input size must be in multiples of {STRIDE} pixels, got {height} x {width}")
    if config.loss == "ms_ssim" and min(height, width) < LEAST_MULTISCALE_SIDE:
        raise ConfigError(
            f"the loss ms_ssim compares at five scales and needs images of at least {LEAST_MULTISCALE_SIDE} x "
            f"{LEAST_MULTISCALE_SIDE} pixels, got {height} x {width}: choose a larger input size, or the loss ssim"
        )


def _downsample(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def _upsample(inputs: int, outputs: int) -> list[nn.Module]:
    return [
        nn.Upsample(scale_factor=2),
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]


def fit_maps(
    maps: Float[Tensor, "batch height width"], images: UInt8[Tensor, "batch channels prepared_height prepared_width"]
) -> Float[Tensor, "batch prepared_height prepared_width"]:
    """Maps in the geometry of the images."""
    return F.interpolate(maps[:, None], images.shape[2:], mode="bilinear", antialias=True)[:, 0]


def compute_errors(
    targets: Float[Tensor, "batch channels height width"], reconstructions: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, "batch height width"]:
    """Squared error of each pixel, mean over channels; 0 is a perfect reconstruction, 1 the worst."""
    return (targets - reconstructions).square().mean(dim=1)


def compute_dissimilarities(
    targets: Float[Tensor, "batch channels height width"], reconstructions: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, "batch height width"]:
    """1 - SSIM about each pixel, mean over channels; 0 is a perfect reconstruction, 2 the worst.

    The window is a Gaussian of 1.5 pixels, and images are mirrored at their borders. They go through torchmetrics one
    above the other: it splits a batch by its size, and a graph that takes batches of any size can't.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure  # torchmetrics takes seconds

    def stack(images: Tensor) -> Tensor:
        return F.pad(images, [WINDOW // 2] * 4, mode="reflect").transpose(0, 1).flatten(1, 2)[None]

    _, similarities = structural_similarity_index_measure(
        stack(reconstructions), stack(targets), data_range=1.0, return_full_image=True
    )
    inside = slice(WINDOW // 2, -(WINDOW // 2))
    one_by_one: Tensor = similarities[0].unflatten(1, (targets.shape[0], -1))
    return 1 - one_by_one[:, :, inside, inside].mean(dim=0)


def compute_dissimilarity(
    targets: Float[Tensor, "batch channels height width"], reconstructions: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, ""]:
    """The mean of `compute_dissimilarities`, with images as channels of one: with gradients it took a tenth at most."""
    from torchmetrics.functional.image import structural_similarity_index_measure  # torchmetrics takes seconds

    similarity = structural_similarity_index_measure(
        reconstructions.flatten(0, 1)[None], targets.flatten(0, 1)[None], data_range=1.0
    )
    assert isinstance(similarity, Tensor)
    return 1 - similarity


def compute_multiscale_dissimilarity(
    targets: Float[Tensor, "batch channels height width"], reconstructions: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, ""]:
    """1 - the mean MS-SSIM of a batch (Wang, Simoncelli and Bovik, 2003); 0 is a perfect reconstruction, 1 the worst.

    Each scale's similarity s goes in as (1 + s) / 2, as the power of a negative one is undefined.
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure  # takes seconds

    similarity = multiscale_structural_similarity_index_measure(
        reconstructions, targets, data_range=1.0, normalize="simple"
    )
    return 1 - similarity


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "ssim": compute_dissimilarity,
    "ms_ssim": compute_multiscale_dissimilarity,
}
