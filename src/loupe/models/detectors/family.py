"""The detectors by name, made and read back."""

from pathlib import Path

import timm

from loupe.errors import ConfigError
from loupe.models.detectors.base import FeatureDetector
from loupe.models.detectors.feature_autoencoder import FeatureAutoencoder
from loupe.models.detectors.features import FeatureConfig, measure_levels
from loupe.models.detectors.knn_patches import KnnPatches
from loupe.models.detectors.padim import Padim
from loupe.models.files import WEIGHTS, load_config, load_weights
from loupe.models.weights import build_backbone, build_options

FAMILY: dict[str, type[FeatureDetector]] = {kind.name: kind for kind in (FeatureAutoencoder, Padim, KnnPatches)}


def build_detector(name: str, config: FeatureConfig, weights: str) -> FeatureDetector:
    """A detector with a pretrained backbone, to be fitted.

    Args:
        name: one of FAMILY.
        weights: where the backbone's weights come from, as `build_backbone` takes it.

    Raises:
        ConfigError: if there is no such detector, or the input is too small for the backbone's features.
        WeightsError: if timm has no such backbone, or its weights can't be had.
    """
    if name not in FAMILY:
        raise ConfigError(f"the detector must be one of {', '.join(FAMILY)}; got {name!r}")
    measure_levels(config)
    options = build_options(config.backbone, config.size, len(config.mean))
    return FAMILY[name](config, build_backbone(config.backbone, weights, **options)).eval()


def load_detector(folder: Path) -> FeatureDetector:
    """Read what `save_detector` wrote, ready to score."""
    values = load_config(folder)
    features = values["features"]
    config = FeatureConfig(**{**features, **{key: tuple(features[key]) for key in ("crop", "size", "mean", "std")}})
    options = build_options(config.backbone, config.size, len(config.mean))
    detector = FAMILY[values["detector"]](config, timm.create_model(config.backbone, pretrained=False, **options))
    load_weights(detector, folder / WEIGHTS)
    return detector.eval()
