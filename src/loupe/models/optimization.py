"""Optimizers by name, from timm, with a rate that decays from the head down."""

import difflib

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from loupe.errors import ConfigError


def check_optimizer(name: str) -> None:
    """Raises ConfigError, with the nearest names, if timm has no such optimizer."""
    known = [str(one) for one in list_optimizers()]
    if name not in known:
        near = ", ".join(difflib.get_close_matches(name, known, n=3)) or "none"
        raise ConfigError(f"train_classifier.optimizer: timm has no optimizer {name!r}; nearest names: {near}")


def build_optimizer(
    backbone: nn.Module, name: str, learning_rate: float, weight_decay: float, layer_decay: float
) -> torch.optim.Optimizer:
    """An optimizer over a timm network; biases and normalisation are not decayed.

    Args:
        name: any of timm's.
        learning_rate: of the head.
        layer_decay: each layer's rate is so many times that of the layer above (Clark et al., ELECTRA,
            arXiv:2003.10555, sec. 3.1); 1 gives all the same.

    Raises:
        ConfigError: if timm has no such optimizer.
    """
    check_optimizer(name)
    decay = None if layer_decay == 1 else layer_decay
    optimizer = create_optimizer_v2(backbone, name, learning_rate, weight_decay, layer_decay=decay)
    for group in optimizer.param_groups:
        group["lr"] *= group.get("lr_scale", 1.0)  # timm's own schedules would do this; torch's do not
    return optimizer
