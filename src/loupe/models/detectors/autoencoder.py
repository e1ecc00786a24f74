"""The undercomplete convolutional autoencoder: what it can't rebuild was not among the normal images.

After Hinton and Salakhutdinov, "Reducing the dimensionality of data with neural networks", Science 313, 2006.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from loupe.models.files import load_config, load_weights, save_model
from loupe.models.preprocess import Preprocess

STRIDE = 8


@dataclass(frozen=True)
class AutoencoderConfig:
    """All that it takes to make the network again.

    `crop` and `size` are (height, width) in pixels, `size` in multiples of STRIDE. The code has `latent_channels`
    values for each STRIDE x STRIDE pixels.
    """

    channels: int
    width: int
    latent_channels: int
    crop: tuple[int, int]
    size: tuple[int, int]


class Autoencoder(nn.Module):
    """uint8 images to reconstructions in [0, 1], of the size the network works at."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        narrow, middle, wide = config.width, 2 * config.width, 4 * config.width
        channels = config.channels
        self.preprocess = Preprocess(config.crop, config.size, channels, [0.0] * channels, [1.0] * channels)
        self.encoder = nn.Sequential(
            *_downsample(channels, narrow),
            *_downsample(narrow, middle),
            *_downsample(middle, wide),
            nn.Conv2d(wide, config.latent_channels, 1),
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

    def forward(
        self, images: UInt8[Tensor, "batch channels prepared_height prepared_width"]
    ) -> tuple[Float[Tensor, "batch channels height width"], Float[Tensor, "batch channels height width"]]:
        """The images as the network sees them, and their reconstructions; both in [0, 1]."""
        targets = self.preprocess(images)
        return targets, self.decoder(self.encoder(targets))


def _downsample(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def _upsample(inputs: int, outputs: int) -> list[nn.Module]:
    return [
        nn.Upsample(scale_factor=2),
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]


def compute_anomaly_map(
    targets: Float[Tensor, "batch channels height width"], reconstructions: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, "batch height width"]:
    """Squared error of each pixel, mean over channels; 0 is a perfect reconstruction, 1 the worst."""
    return (targets - reconstructions).square().mean(dim=1)


def compute_anomaly_score(anomaly_map: Float[Tensor, "batch height width"]) -> Float[Tensor, " batch"]:
    """Mean of the map: the reconstruction error of the image."""
    return anomaly_map.mean(dim=(1, 2))


def save_autoencoder(autoencoder: Autoencoder, extra: dict[str, Any], folder: Path) -> None:
    """Write the network and its config; `extra` is kept beside it."""
    save_model(autoencoder, {**extra, "autoencoder": asdict(autoencoder.config)}, folder)


def load_autoencoder(folder: Path) -> Autoencoder:
    """Read what `save_autoencoder` wrote, ready to score."""
    values = load_config(folder)["autoencoder"]
    config = AutoencoderConfig(**{**values, "crop": tuple(values["crop"]), "size": tuple(values["size"])})
    autoencoder = Autoencoder(config)
    load_weights(autoencoder, folder / "model.safetensors")
    return autoencoder.eval()


@torch.inference_mode()
def compute_maps(
    autoencoder: Autoencoder, images: UInt8[Tensor, "num_images channels height width"], batch_size: int = 128
) -> Float[Tensor, "num_images height width"]:
    """Anomaly maps in the geometry of the images, in batches on the autoencoder's device; the result is on the CPU."""
    maps = []
    for batch in images.split(batch_size):
        anomaly_map = compute_anomaly_map(*autoencoder(batch.to(autoencoder.preprocess.mean.device)))
        maps.append(F.interpolate(anomaly_map[:, None], images.shape[2:], mode="bilinear", antialias=True)[:, 0].cpu())
    return torch.cat(maps)


@torch.inference_mode()
def compute_scores(
    autoencoder: Autoencoder, images: UInt8[Tensor, "num_images channels height width"], batch_size: int = 128
) -> Float[Tensor, " num_images"]:
    """Raw anomaly scores, in batches on the autoencoder's device; the result is on the CPU."""
    parts = [
        compute_anomaly_score(compute_anomaly_map(*autoencoder(batch.to(autoencoder.preprocess.mean.device))))
        for batch in images.split(batch_size)
    ]
    return torch.cat(parts).cpu()
