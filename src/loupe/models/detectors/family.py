"""The detectors by name, made and read back."""

from pathlib import Path
from typing import Any

from loupe.errors import ConfigError
from loupe.models.detectors.autoencoder import Autoencoder
from loupe.models.detectors.base import Detector
from loupe.models.detectors.deep_feature_autoencoder import DeepFeatureAutoencoder
from loupe.models.detectors.denoising_autoencoder import DenoisingAutoencoder
from loupe.models.detectors.feature_autoencoder import FeatureAutoencoder
from loupe.models.detectors.features import FeatureConfig, measure_levels
from loupe.models.detectors.knn_patches import KnnPatches
from loupe.models.detectors.padim import Padim
from loupe.models.detectors.tiling import TiledDetector
from loupe.models.detectors.vae import Vae
from loupe.models.files import WEIGHTS, load_config, load_weights

FAMILY: dict[str, type[Detector]] = {
    kind.name: kind
    for kind in (
        Autoencoder,
        DenoisingAutoencoder,
        Vae,
        FeatureAutoencoder,
        DeepFeatureAutoencoder,
        KnnPatches,
        Padim,
        TiledDetector,
    )
}


def build_detector(name: str, config: Any, weights: str) -> Detector:
    """A detector to be fitted.

    Args:
        name: one of FAMILY.
        config: of its `config_type`.
        weights: where a backbone's weights come from, as `build_backbone` takes it.

    Raises:
        ConfigError: if there is no such detector, or the input is too small for the backbone's features.
        WeightsError: if timm has no such backbone, or its weights can't be had.
    """
    if name not in FAMILY:
        raise ConfigError(f"the detector must be one of {', '.join(FAMILY)}; got {name!r}")
    if isinstance(config, FeatureConfig):
        measure_levels(config)
    return FAMILY[name].build(config, weights).eval()


def load_detector(folder: Path) -> Detector:
    """Read what `save_detector` wrote, ready to score."""
    values = load_config(folder)
    name = values["detector"]
    detector = FAMILY[name].build(_read_config(name, values["config"]), "none")
    load_weights(detector, folder / WEIGHTS)
    return detector.eval()


def _read_config(name: str, values: dict[str, Any]) -> Any:
    """A detector's config from JSON; that of a tiled one holds another's."""
    plain: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    if name == TiledDetector.name:
        plain["inner"] = _read_config(plain["detector"], plain["inner"])
    return FAMILY[name].config_type(**plain)
