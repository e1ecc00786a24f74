"""What every detector is: uint8 images to raw anomaly scores and maps, fitted on normal images alone."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from loupe.errors import DataError
from loupe.models.detectors.features import FeatureConfig, FeatureExtractor, Features
from loupe.models.files import save_model

Images = Iterable[UInt8[Tensor, "_batch channels height width"]]
Batches = Callable[[], Iterable[Features]]


class Detector(nn.Module, ABC):
    """A higher score is more anomalous; nothing is clamped or normalised to a range."""

    @abstractmethod
    def forward(
        self, images: UInt8[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch height width"]]:
        """The anomaly scores, and anomaly maps in the geometry of the images."""


class FeatureDetector(Detector):
    """A detector that works on the features of a frozen backbone and is fitted in closed form.

    `least_images` is how many normal images it takes to fit it.
    """

    name: ClassVar[str]
    least_images: ClassVar[int] = 2

    def __init__(self, config: FeatureConfig, backbone: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.extractor = FeatureExtractor(config, backbone)

    @abstractmethod
    def fit_features(self, batches: Batches, generator: torch.Generator) -> None:
        """Fit to the features of at least `least_images` normal images.

        Args:
            batches: gives them from the start, as often as it is called.
            generator: what is drawn at random, where anything is; on the CPU.
        """

    @abstractmethod
    def score_features(self, features: Features) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch rows columns"]]:
        """The anomaly scores, and anomaly maps at the finest scale of the features."""

    def forward(
        self, images: UInt8[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch height width"]]:
        scores, maps = self.score_features(self.extractor(images))
        return scores, F.interpolate(maps[:, None], images.shape[2:], mode="bilinear")[:, 0]


def fit_detector(detector: FeatureDetector, images: Images, seed: int, most_bytes: int = 1 << 29) -> None:
    """Fit to normal images, on the detector's device.

    Args:
        images: batches; gone through more than once, so a list or a loader and no generator.
        seed: of what is drawn at random, where anything is.
        most_bytes: so much of the features is kept in memory, and the rest computed at each pass again.

    Raises:
        DataError: if there are too few images; says how many are needed.
    """
    num_images = sum(len(batch) for batch in images)
    if num_images < detector.least_images:
        raise DataError(
            f"{detector.name} needs at least {detector.least_images} normal images to be fitted, got {num_images}: "
            f"add images, or choose another detector"
        )
    memory = _FeatureMemory(detector.extractor, images, most_bytes)
    detector.eval().fit_features(memory.read, torch.Generator().manual_seed(seed))


class _FeatureMemory:
    """Features batch by batch: those that fit in memory are computed once."""

    def __init__(self, extractor: FeatureExtractor, images: Images, most_bytes: int) -> None:
        self.extractor = extractor
        self.images = images
        self.bytes_left = most_bytes
        self.kept: dict[int, Features] = {}

    @torch.inference_mode()
    def read(self) -> Iterable[Features]:
        for index, batch in enumerate(self.images):
            features = self.kept.get(index) or self.extractor(batch.to(self.extractor.device))
            if index not in self.kept:
                self._keep(index, features)
            yield features

    def _keep(self, index: int, features: Features) -> None:
        num_bytes = sum(level.nbytes for level in features)
        if num_bytes <= self.bytes_left:
            self.bytes_left -= num_bytes
            self.kept[index] = features


@torch.inference_mode()
def detect(
    detector: Detector, images: UInt8[Tensor, "num_images channels height width"], batch_size: int = 32
) -> tuple[Float[Tensor, " num_images"], Float[Tensor, "num_images height width"]]:
    """Raw anomaly scores and maps, in batches on the detector's device; the results are on the CPU."""
    device = next(detector.buffers()).device
    parts = [detector(batch.to(device)) for batch in images.split(batch_size)]
    scores, maps = zip(*parts, strict=True)
    return torch.cat(scores).cpu(), torch.cat(maps).cpu()


def save_detector(detector: FeatureDetector, extra: dict[str, Any], folder: Path) -> None:
    """Write the detector, its backbone and its config; `extra` is kept beside it."""
    save_model(detector, {**extra, "detector": detector.name, "features": asdict(detector.config)}, folder)
