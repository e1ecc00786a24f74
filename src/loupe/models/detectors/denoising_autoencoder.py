"""The denoising autoencoder: corrupted images come in, and clean ones must come out.

After Vincent et al., "Extracting and composing robust features with denoising autoencoders", ICML 2008. What it learns
is to bring an image back to the normal ones; defects that it learnt to take away are rebuilt as if they were not there.
"""

from dataclasses import dataclass

from jaxtyping import Float, UInt8
from torch import Tensor

from loupe.models.detectors.autoencoder import Autoencoder, AutoencoderConfig
from loupe.models.detectors.corruption import corrupt


@dataclass(frozen=True)
class DenoisingConfig(AutoencoderConfig):
    """The same, and how images are corrupted, as `corrupt` takes it; 0 is never."""

    noise: float = 0.1
    masked: float = 0.05
    defects: float = 0.5


class DenoisingAutoencoder(Autoencoder):
    """Only what it is trained on is corrupted: scores, maps and codes are those of the images as they are."""

    name = "denoising_autoencoder"
    config_type = DenoisingConfig
    config: DenoisingConfig

    def corrupt(
        self, targets: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Images as the network sees them, in [0, 1], corrupted; drawn by torch's global generator."""
        return corrupt(targets, self.config.noise, self.config.masked, self.config.defects)

    def compute_losses(
        self, images: UInt8[Tensor, "batch channels height width"], progress: float
    ) -> dict[str, Float[Tensor, ""]]:
        targets = self.preprocess(images)
        return {"loss": self.compare(targets, self.decoder(self.encode(self.corrupt(targets))))}
