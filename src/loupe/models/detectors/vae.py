"""The variational autoencoder: a code that is drawn, and a bound on how likely an image is.

Kingma and Welling, "Auto-encoding variational Bayes", 2014 (arXiv:1312.6114); with `beta`, Higgins et al., "beta-VAE",
2017. A pixel's value is Gaussian about its reconstruction, with one variance for all pixels: in training that which is
likeliest for the batch, its mean squared error, and afterwards a running mean of it ("optimal sigma-VAE", Rybkin et
al., 2021, arXiv:2006.13202). Both parts of the bound are so in nats an image, and need no weight to suit each other.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from loupe.errors import ConfigError
from loupe.models.detectors.autoencoder import Autoencoder, AutoencoderConfig, compute_errors, fit_maps

LEAST_VARIANCE = 1 / 12 / 255**2  # what rounding to 8 bits does to a value in [0, 1]
MOMENTUM = 0.1  # of the running mean of the variance, as in batch normalisation

Score = Literal["reconstruction", "kl", "elbo"]


@dataclass(frozen=True)
class VaeConfig(AutoencoderConfig):
    """The same, and how the two parts of the bound are weighed.

    `beta` weighs the KL divergence in training, and grows linearly from 0 over the first part `warm_up` of it. `score`
    is what the anomaly score is: either part of the negative bound, or the whole of it with the weight 1.
    """

    beta: float = 1.0
    warm_up: float = 0.3
    score: Score = "elbo"


class Vae(Autoencoder):
    """The map is the squared error of each pixel whatever the score, which is in nats an image.

    The code is drawn where losses are computed; scores, maps and reconstructions are those of its mean.
    """

    name = "vae"
    config_type = VaeConfig
    config: VaeConfig
    values_per_code: ClassVar[int] = 2  # mean and logarithm of the variance

    variance: Tensor

    def __init__(self, config: VaeConfig) -> None:
        """Raises ConfigError if the loss is another than mse, or the input size is none that it takes."""
        super().__init__(config)
        if config.loss != "mse":
            raise ConfigError(f"the vae's pixels are Gaussian, so its loss must be mse; got {config.loss}")
        self.register_buffer("variance", torch.tensor(0.1))

    def encode_distribution(
        self, targets: Float[Tensor, "batch channels height width"]
    ) -> tuple[
        Float[Tensor, "batch latent_channels rows columns"], Float[Tensor, "batch latent_channels rows columns"]
    ]:
        """Mean and logarithm of the variance of each value of the code; in float32."""
        mean, log_variance = self.encoder(targets).float().chunk(2, dim=1)
        return mean, log_variance

    def encode(
        self, targets: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch latent_channels rows columns"]:
        """The code's mean."""
        return self.encode_distribution(targets)[0]

    def forward(
        self, images: UInt8[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch height width"]]:
        targets = self.preprocess(images)
        mean, log_variance = self.encode_distribution(targets)
        reconstructions = self.decoder(mean)
        parts = {
            "reconstruction": compute_surprise(targets, reconstructions, self.variance),
            "kl": compute_kl(mean, log_variance),
        }
        score = sum(parts.values()) if self.config.score == "elbo" else parts[self.config.score]
        assert isinstance(score, Tensor)
        return score, fit_maps(compute_errors(targets, reconstructions), images)

    def compute_losses(
        self, images: UInt8[Tensor, "batch channels height width"], progress: float
    ) -> dict[str, Float[Tensor, ""]]:
        """`loss`, and its parts `reconstruction` and `kl`; all in nats an image.

        The code is drawn by torch's global generator. In training the variance of the pixels is the batch's own.
        """
        targets = self.preprocess(images)
        mean, log_variance = self.encode_distribution(targets)
        code = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        reconstructions = self.decoder(code).float()
        variance = self._choose_variance(targets, reconstructions)
        reconstruction = compute_surprise(targets, reconstructions, variance).mean()
        kl = compute_kl(mean, log_variance).mean()
        weight = compute_weight(self.config.beta, self.config.warm_up, progress)
        return {"loss": reconstruction + weight * kl, "reconstruction": reconstruction, "kl": kl}

    def _choose_variance(self, targets: Tensor, reconstructions: Tensor) -> Tensor:
        if not self.training:
            return self.variance
        variance = compute_errors(targets, reconstructions).mean().clamp(min=LEAST_VARIANCE)
        self.variance.lerp_(variance.detach(), MOMENTUM)
        return variance


def compute_weight(beta: float, warm_up: float, progress: float) -> float:
    """The weight of the KL divergence; `warm_up` and `progress` are parts of the training, in [0, 1]."""
    return beta * min(1.0, progress / warm_up) if warm_up else beta


def compute_surprise(
    targets: Float[Tensor, "batch channels height width"],
    reconstructions: Float[Tensor, "batch channels height width"],
    variance: Float[Tensor, ""],
) -> Float[Tensor, " batch"]:
    """-log p(image | code) in nats, summed over pixels and channels; below 0 where the density is above 1."""
    squares = (targets - reconstructions).square().flatten(1)
    return (squares.sum(dim=1) / variance + squares.shape[1] * (2 * math.pi * variance).log()) / 2


def compute_kl(
    mean: Float[Tensor, "batch latent_channels rows columns"],
    log_variance: Float[Tensor, "batch latent_channels rows columns"],
) -> Float[Tensor, " batch"]:
    """KL divergence of the code's Gaussian from the standard one, in nats, summed over the code (appendix B)."""
    divergences = (mean.square() + log_variance.exp() - log_variance - 1) / 2
    return divergences.flatten(1).sum(dim=1)
