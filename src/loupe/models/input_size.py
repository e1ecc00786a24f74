"""Which sizes a network can take: tried out with shapes alone, on torch's meta device, where there are no numbers."""

from bisect import bisect_left
from typing import Any

import timm
import torch
from torch import nn

from loupe.errors import ConfigError
from loupe.models.weights import build_options, check_backbone

MOST_PIXELS = 2048


def build_shapes(name: str, size: tuple[int, int], channels: int, **others: Any) -> nn.Module:
    """A timm network for images of size (height, width), with shapes and without numbers."""
    with torch.device("meta"):
        network: nn.Module = timm.create_model(name, **build_options(name, size, channels), **others)
    return network.eval().requires_grad_(False)


def check_input_size(name: str, height: int, width: int, channels: int) -> None:
    """See that a network can take images of that many pixels and channels.

    Raises:
        WeightsError: if timm has no such network.
        ConfigError: if it can't; says which is the smallest square that it takes, if the images are smaller.
    """
    check_backbone(name)
    problem = _find_problem(name, (height, width), channels)
    if not problem:
        return
    smallest = find_smallest_side(name, channels)
    if smallest is not None and min(height, width) < smallest:
        raise ConfigError(
            f"{name} needs images of at least {smallest} x {smallest} pixels, got {height} x {width}: "
            f"choose a larger input size or another network"
        )
    raise ConfigError(f"{name} can't take images of {height} x {width} pixels: {problem}")


def find_smallest_side(name: str, channels: int) -> int | None:
    """The smallest square that a network takes, in pixels; None if it takes none of 1, 2, 4, ... up to 2048."""

    def works(side: int) -> bool:
        return not _find_problem(name, (side, side), channels)

    side = 1
    while not works(side):
        side *= 2
        if side > MOST_PIXELS:
            return None
    return bisect_left(range(side), True, lo=side // 2 + 1, key=works)


@torch.no_grad()
def _find_problem(name: str, size: tuple[int, int], channels: int) -> str:
    """What torch or timm says against that size in its first line; nothing if the network takes it."""
    try:
        build_shapes(name, size, channels)(torch.empty(1, channels, *size, device="meta"))
    except Exception as error:  # there are as many kinds as layers
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return ""
