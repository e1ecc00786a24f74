"""A network layer by layer: shapes, parameters, and how much of the image each layer sees."""

from collections import defaultdict, deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torchinfo
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchinfo.layer_info import LayerInfo

from loupe.models.classifiers import get_data_config
from loupe.models.input_size import build_shapes, check_input_size
from loupe.models.receptive_field import Field, FieldTracker

Fields = dict[int, deque[Field | None]]


class Layer(NamedTuple):
    """One layer that holds parameters, slides a window, or changes the shape of what passes.

    `output_shape` is without the batch; `receptive_field` is (height, width) in pixels, None for the whole image (and
    for what does not depend on it, such as a table of positions).
    """

    name: str
    kind: str
    output_shape: tuple[int, ...]
    num_parameters: int
    receptive_field: tuple[int, int] | None


@dataclass(frozen=True)
class Explanation:
    """A network on one image of `input_shape`: channels, height and width.

    `num_multiply_adds` is of convolutions and matrix products, without biases. The layers' parameters sum to
    `num_parameters`, except where a network takes a layer's weights without calling the layer (BEiT).
    """

    name: str
    input_shape: tuple[int, int, int]
    layers: list[Layer]
    num_parameters: int
    num_bytes: int
    num_multiply_adds: int


def explain_network(
    name: str, size: tuple[int, int] | None = None, channels: int | None = None, num_classes: int | None = None
) -> Explanation:
    """Follow an image's shape through a network; nothing is computed, and no weights are needed.

    The receptive field is an upper bound in some networks (FieldTracker says which), and may be larger than the image,
    because it reaches into the padding.

    Args:
        name: any name that timm knows.
        size: height and width of the image in pixels; the network's own if not given, as for the others.

    Raises:
        WeightsError: if timm has no such network.
        ConfigError: if the network can't take images of that size.
    """
    native = get_data_config(name)
    height, width = size or (native.input_size, native.input_size)
    channels = channels or len(native.mean)
    check_input_size(name, height, width, channels)
    others: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    network = build_shapes(name, (height, width), channels, **others)
    facts, fields, num_multiply_adds = _follow(network, torch.empty(1, channels, height, width, device="meta"))
    parameters = list(network.parameters())
    return Explanation(
        name=name,
        input_shape=(channels, height, width),
        layers=[layer for info in facts if info.executed for layer in _describe(info, fields[info.layer_id].popleft())],
        num_parameters=sum(values.numel() for values in parameters),
        num_bytes=sum(values.numel() * values.element_size() for values in parameters),
        num_multiply_adds=num_multiply_adds,
    )


def _follow(network: nn.Module, image: torch.Tensor) -> tuple[list[LayerInfo], Fields, int]:
    """One forward pass: torchinfo's facts of each call, the fields of each module's calls, and multiply-adds."""
    tracker, fields = FieldTracker(image), defaultdict[int, deque[Field | None]](deque)
    hooks = [
        module.register_forward_hook(
            lambda module, inputs, outputs: fields[id(module)].append(tracker.get_field(outputs))
        )
        for module in network.modules()
    ]
    with FlopCounterMode(display=False) as flops, tracker:
        facts = torchinfo.summary(network, input_data=image, mode="eval", verbose=0)
    for hook in hooks:
        hook.remove()
    return facts.summary_list, fields, flops.get_total_flops() // 2


def _describe(info: LayerInfo, field: Field | None) -> list[Layer]:
    """Nothing of a call that only contains others, or passes a shape on as it is (ReLU, dropout)."""
    own = 0 if info.is_recursive else sum(values.numel() for values in info.module.parameters(recurse=False))
    changes = info.is_leaf_layer and (info.kernel_size is not None or info.output_size != info.input_size)
    if not (own or changes):
        return []
    shape = tuple(info.output_size[1:])
    return [Layer(_build_path(info), _describe_kind(info), shape, own, field.size if field else None)]


def _build_path(info: LayerInfo) -> str:
    parts: list[str] = []
    while info.parent_info is not None:
        parts.insert(0, info.var_name)
        info = info.parent_info
    return ".".join(parts) or "(itself)"


def _describe_kind(info: LayerInfo) -> str:
    """The class, the kernel and the stride, such as `Conv2d 3x3 /2`."""
    if info.kernel_size is None:
        return info.class_name
    sides: tuple[Any, Any] = (info.kernel_size, info.module.stride)
    kernel, stride = ([side, side] if isinstance(side, int) else list(side) for side in sides)
    steps = "x".join(str(step) for step in dict.fromkeys(stride))  # 2x2 is written 2
    return f"{info.class_name} {'x'.join(map(str, kernel))}{'' if steps == '1' else f' /{steps}'}"
