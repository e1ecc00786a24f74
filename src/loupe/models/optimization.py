"""What of a network is trained, and by which of timm's optimizers, with a rate that decays from the head down."""

import difflib
from contextlib import suppress

import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from loupe.errors import ConfigError

ADAM_EPSILON = 1e-8  # RMSProp of TensorFlow, AdaBelief and others add another to another quantity


def check_optimizer(name: str) -> None:
    """See that timm has such an optimizer, and that it can make a step here.

    Raises:
        ConfigError: if it has none, with the nearest names; or if it wants what is not here, such as a CUDA device.
    """
    known = [str(one) for one in list_optimizers()]
    if name not in known:
        near = ", ".join(difflib.get_close_matches(name, known, n=3)) or "none"
        raise ConfigError(f"train_classifier.optimizer: timm has no optimizer {name!r}; nearest names: {near}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = nn.Linear(2, 1).to(device)
    try:
        optimizer = create_optimizer_v2(layer, name, 1e-3, 0.0)
        layer(torch.ones(1, 2, device=device)).sum().backward()
        optimizer.step()
    except Exception as error:  # there are as many kinds as optimizers
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(f"train_classifier.optimizer: {name} can't be used here: {reason}") from error


def build_optimizer(
    backbone: nn.Module,
    name: str,
    learning_rate: float,
    weight_decay: float,
    layer_decay: float,
    epsilon: float | None = None,
) -> torch.optim.Optimizer:
    """An optimizer over a timm network; biases and normalisation are not decayed.

    Args:
        name: any of timm's.
        learning_rate: of the head.
        layer_decay: each layer's rate is so many times that of the layer above (Clark et al., ELECTRA,
            arXiv:2003.10555, sec. 3.1); 1 gives all the same.
        epsilon: in place of Adam's, of it and of those that have the same; None leaves timm's.
    """
    decay = None if layer_decay == 1 else layer_decay
    optimizer = create_optimizer_v2(backbone, name, learning_rate, weight_decay, layer_decay=decay)
    for group in optimizer.param_groups:
        group["lr"] *= group.get("lr_scale", 1.0)  # timm's own schedules would do this; torch's do not
        if epsilon is not None and group.get("eps") == ADAM_EPSILON:
            group["eps"] = epsilon
    return optimizer


def freeze_layers(backbone: nn.Module, share: float) -> None:
    """Leave the first layers of a timm network out of its training; the others, the head among them, are trained.

    Args:
        share: of the stages that timm groups the network's weights into, in [0, 1); a part of a stage is trained.
    """
    stages = _number_stages(backbone)
    first_trained = int(share * (max(stages.values()) + 1))
    for name, weights in backbone.named_parameters():
        weights.requires_grad_(stages[name] >= first_trained)


def _number_stages(backbone: nn.Module) -> dict[str, int]:
    """Of each weight, from the input on; in a network that timm can't group, each layer is a stage."""
    with suppress(AttributeError, AssertionError):  # it has no such groups, or none so coarse
        numbers: dict[str, int] = group_parameters(backbone, backbone.group_matcher(coarse=True), reverse=True)  # type: ignore[operator]
        return numbers
    layers = [name.rpartition(".")[0] for name, _ in backbone.named_parameters()]
    order = list(dict.fromkeys(layers))
    return {name: order.index(layer) for (name, _), layer in zip(backbone.named_parameters(), layers, strict=True)}
