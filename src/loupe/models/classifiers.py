"""Image classifiers: a timm backbone with a new head, and the preprocessing that belongs to it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from loupe.errors import ConfigError
from loupe.models.files import load_config, load_weights, save_model
from loupe.models.input_size import check_input_size
from loupe.models.preprocess import Preprocess
from loupe.models.weights import build_backbone, build_options, check_backbone


class DataConfig(NamedTuple):
    """How a backbone's images were prepared when it was pretrained: timm's own data config.

    `input_size` is a side in pixels, `crop_fraction` the part of the resized side that is kept; `mean` and `std` have
    one value a channel.
    """

    input_size: int
    crop_fraction: float
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def fit_channels(self, channels: int) -> "DataConfig":
        """The same for images of another number of channels: each then has the average of mean and std."""
        if len(self.mean) == channels:
            return self
        mean, std = (sum(values) / len(values) for values in (self.mean, self.std))
        return self._replace(mean=(mean,) * channels, std=(std,) * channels)


def get_data_config(backbone: str) -> DataConfig:
    """Raises WeightsError if timm has no such backbone."""
    check_backbone(backbone)
    pretrained = timm.get_pretrained_cfg(backbone)
    assert pretrained is not None  # every registered model has one
    config: dict[str, Any] = timm.data.resolve_data_config(pretrained_cfg=pretrained.to_dict())
    return DataConfig(
        config["input_size"][-1],
        config["crop_pct"],
        config["interpolation"],
        tuple(config["mean"]),
        tuple(config["std"]),
    )


def choose_channels(backbone: str, weights: str, image_channels: int) -> int:
    """How many channels a network sees of images that have 1 (grey) or 3.

    A random one sees what there is. A pretrained one sees what it was trained on; of colours, none is taken away.

    Raises:
        WeightsError: if timm has no such backbone.
    """
    native = len(get_data_config(backbone).mean)
    return image_channels if weights == "none" else max(native, image_channels)


@dataclass(frozen=True)
class ClassifierConfig:
    """All that it takes to make the network again.

    `crop` and `size` are (height, width) in pixels; `channels` is what the network sees, and grey images are repeated
    where that is more than they have.
    """

    backbone: str
    labels: list[str]
    crop: tuple[int, int]
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: int = 3
    channels_last: bool = True

    @property
    def memory_format(self) -> torch.memory_format:
        """How images and weights lie in memory."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


class Classifier(nn.Module):
    """uint8 images to logits, one a label."""

    def __init__(self, config: ClassifierConfig, backbone: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.preprocess = Preprocess(
            config.crop, config.size, config.channels, config.mean, config.std, config.memory_format
        )
        self.backbone = backbone.to(memory_format=config.memory_format)

    @property
    def head(self) -> nn.Module | tuple[nn.Module, ...]:
        """The last layer: features to logits. Networks that were distilled have two."""
        head: nn.Module | tuple[nn.Module, ...] = self.backbone.get_classifier()  # type: ignore[operator]
        return head

    def compute_features(
        self, images: UInt8[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch num_features"]:
        """What the head sees."""
        return self.compute_both(images)[0]

    def compute_both(
        self, images: UInt8[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, "batch num_features"], Float[Tensor, "batch num_labels"]]:
        """Features and logits."""
        maps = self.backbone.forward_features(self.preprocess(images))  # type: ignore[operator]
        features, logits = (self.backbone.forward_head(maps, pre_logits=only) for only in (True, False))  # type: ignore[operator]
        return features, logits

    def forward(self, images: UInt8[Tensor, "batch channels height width"]) -> Float[Tensor, "batch num_labels"]:
        logits: Tensor = self.backbone(self.preprocess(images))
        return logits


def build_classifier(
    config: ClassifierConfig, weights: str, *, drop_rate: float | None = None, drop_path: float | None = None
) -> Classifier:
    """A pretrained backbone with a new head of as many outputs as there are labels.

    Args:
        drop_rate: part of the features that training drops before the head; None leaves what timm gives the network.
        drop_path: part of the residual branches that training leaves out; None likewise.

    Raises:
        WeightsError: if the backbone or its weights can't be had.
        ConfigError: if the backbone can't take images of that size, or has no residual branches to leave out; nothing
            is loaded or trained before.
    """
    check_input_size(config.backbone, *config.size, config.channels)
    options = build_options(config.backbone, config.size, config.channels)
    dropped = {"drop_rate": drop_rate, "drop_path_rate": drop_path}
    options |= {name: part for name, part in dropped.items() if part is not None}
    try:
        backbone = build_backbone(config.backbone, weights, **options)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        raise ConfigError(
            f"{config.backbone} has no residual branches to leave out: set train_classifier.drop_path to auto"
        ) from error
    backbone.reset_classifier(len(config.labels))  # type: ignore[operator]
    _silence_auxiliary_head(backbone)
    return Classifier(config, backbone)


def _silence_auxiliary_head(backbone: nn.Module) -> None:
    """VOLO adds the logits of a second head, which is to say nothing before it has learnt anything."""
    auxiliary = getattr(backbone, "aux_head", None)
    if auxiliary is not None:
        for parameter in auxiliary.parameters():
            nn.init.zeros_(parameter)


def save_classifier(classifier: Classifier, extra: dict[str, Any], folder: Path) -> None:
    """Write the network and its config; `extra` is kept beside it."""
    save_model(classifier, {**extra, "classifier": asdict(classifier.config)}, folder)


def load_classifier(folder: Path) -> Classifier:
    """Read what `save_classifier` wrote, ready to predict."""
    values = load_config(folder)["classifier"]
    config = ClassifierConfig(**{**values, **{key: tuple(values[key]) for key in ("crop", "size", "mean", "std")}})
    options = build_options(config.backbone, config.size, config.channels)
    network = timm.create_model(config.backbone, pretrained=False, **options)
    network.reset_classifier(len(config.labels))  # type: ignore[operator]
    classifier = Classifier(config, network)
    load_weights(classifier, folder / "model.safetensors")
    return classifier.eval()


@torch.inference_mode()
def predict_probabilities(
    classifier: Classifier, images: UInt8[Tensor, "num_images channels height width"], batch_size: int = 128
) -> Float[Tensor, "num_images num_labels"]:
    """Softmax of the logits, in batches on the classifier's device; the result is on the CPU."""
    device = next(classifier.parameters()).device
    parts = [classifier(batch.to(device)).float().softmax(dim=1).cpu() for batch in images.split(batch_size)]
    return torch.cat(parts)


def compute_targets(labels: np.ndarray, classes: list[str]) -> Int64[np.ndarray, " num_images"]:
    """The position of each label in `classes`."""
    positions = {label: position for position, label in enumerate(classes)}
    return np.array([positions[label] for label in labels], dtype=np.int64)
