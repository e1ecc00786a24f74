"""What every detector is: uint8 images to raw anomaly scores and maps, fitted on normal images alone."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from loupe.errors import DataError
from loupe.models.detectors.features import FeatureConfig, FeatureExtractor, Features, choose_reductions
from loupe.models.files import save_model
from loupe.models.weights import build_backbone, build_options

Images = Iterable[UInt8[Tensor, "_batch channels height width"]]


class Detector(nn.Module, ABC):
    """A higher score is more anomalous; nothing is clamped or normalised to a range.

    `least_images` is how many normal images it takes to fit it. `config`, a dataclass of `config_type`, is all that it
    takes to make it again but for the weights.
    """

    name: ClassVar[str]
    config_type: ClassVar[type]
    least_images: int = 2
    config: Any

    @classmethod
    @abstractmethod
    def build(cls, config: Any, weights: str) -> "Detector":
        """A detector to be fitted, or to load weights into.

        Args:
            weights: where a backbone's weights come from, as `build_backbone` takes it; `none` before loading.
        """

    @abstractmethod
    def forward(
        self, images: UInt8[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch height width"]]:
        """The anomaly scores, and anomaly maps in the geometry of the images."""

    @abstractmethod
    def embed(self, images: UInt8[Tensor, "batch channels height width"]) -> Float[Tensor, "batch num_values"]:
        """Each image as a vector: the latent code, or the backbone's features."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.buffers()).device


class TrainedDetector(Detector):
    """A detector that is trained by gradient descent, on images that are augmented and shuffled."""

    @abstractmethod
    def compute_losses(
        self, images: UInt8[Tensor, "batch channels height width"], progress: float
    ) -> dict[str, Float[Tensor, ""]]:
        """`loss`, which the training lowers, and by other names its parts, if it has any; means over the batch.

        Args:
            progress: how much of the training is done, in [0, 1].
        """


class FeatureDetector(Detector):
    """A detector that works on the features of a frozen backbone and is fitted in closed form.

    One that `looks_twice` also sees each image made smaller, where its backbone can.
    """

    config_type = FeatureConfig
    looks_twice: ClassVar[bool] = False

    def __init__(self, config: FeatureConfig, backbone: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.extractor = FeatureExtractor(config, backbone, choose_reductions(config) if self.looks_twice else [1])

    @classmethod
    def build(cls, config: FeatureConfig, weights: str) -> "FeatureDetector":
        options = build_options(config.backbone, config.size, len(config.mean))
        return cls(config, build_backbone(config.backbone, weights, **options))

    @abstractmethod
    def fit_features(self, batches: Iterable[Features], generator: torch.Generator, most_bytes: int) -> None:
        """Fit to the features of at least `least_images` normal images, in one pass.

        Args:
            generator: what is drawn at random, where anything is; on the CPU.
            most_bytes: so much of the features may be kept, by a detector that keeps any.
        """

    @abstractmethod
    def score_features(self, features: Features) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch rows columns"]]:
        """The anomaly scores, and anomaly maps at the finest scale of the features."""

    def forward(
        self, images: UInt8[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch height width"]]:
        scores, maps = self.score_features(self.extractor(images))
        return scores, F.interpolate(maps[:, None], images.shape[2:], mode="bilinear")[:, 0]

    def embed(self, images: UInt8[Tensor, "batch channels height width"]) -> Float[Tensor, "batch num_values"]:
        """The means of all channels of all levels, finest first, one view after the other."""
        return torch.cat([level.mean(dim=(2, 3)) for level in self.extractor(images)], dim=1)


def check_num_images(detector: Detector, num_images: int) -> None:
    """Raises DataError, which says how many are needed, if there are too few normal images to fit it."""
    if num_images < detector.least_images:
        raise DataError(
            f"{detector.name} needs at least {detector.least_images} normal images to be fitted, got {num_images}: "
            f"add images, or choose another detector"
        )


def fit_detector(detector: FeatureDetector, images: Images, seed: int, most_bytes: int = 1 << 28) -> None:
    """Fit to normal images, on the detector's device.

    Args:
        images: batches; begun twice, as they are counted first, so a list or a loader and no generator.
        seed: of what is drawn at random, where anything is.
        most_bytes: so much of the features may be kept; those of one batch, and what is summed up, come on top.

    Raises:
        DataError: if there are too few images; says how many are needed.
    """
    check_num_images(detector, _count_images(images, detector.least_images))
    batches = _extract_features(detector.eval().extractor, images)
    detector.fit_features(batches, torch.Generator().manual_seed(seed), most_bytes)


def _count_images(images: Images, enough: int) -> int:
    """How many there are, but no more batches are read once there are `enough`."""
    count = 0
    for batch in images:
        count += len(batch)
        if count >= enough:
            break
    return count


@torch.inference_mode()
def _extract_features(extractor: FeatureExtractor, images: Images) -> Iterator[Features]:
    for batch in images:
        yield extractor(batch.to(extractor.device))


@torch.inference_mode()
def detect(
    detector: Detector, images: UInt8[Tensor, "num_images channels height width"], batch_size: int = 16
) -> tuple[Float[Tensor, " num_images"], Float[Tensor, "num_images height width"]]:
    """Raw anomaly scores and maps, in batches on the detector's device; the results are on the CPU."""
    parts = [detector(batch.to(detector.device)) for batch in images.split(batch_size)]
    scores, maps = zip(*parts, strict=True)
    return torch.cat(scores).cpu(), torch.cat(maps).cpu()


@torch.inference_mode()
def compute_scores(detector: Detector, batches: Images) -> Float[Tensor, " num_images"]:
    """Raw anomaly scores alone, which take no memory worth a word; on the CPU."""
    return torch.cat([detector(batch.to(detector.device))[0].cpu() for batch in batches])


def save_detector(detector: Detector, extra: dict[str, Any], folder: Path) -> None:
    """Write the detector, a backbone that it has, and its config; `extra` is kept beside it."""
    save_model(detector, {**extra, "detector": detector.name, "config": asdict(detector.config)}, folder)
