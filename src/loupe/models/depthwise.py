"""Depthwise convolutions of maps that are smaller than the kernel: torch's numbers, and trained faster on a CPU.

oneDNN is slow at their weights' gradient: of 64 maps of 1152 x 2 x 2 and a kernel of 5 x 5, it takes 40 ms where
products of shifted maps take 4. Networks that are made for large images have many such layers when they see small ones.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Maps = Float[Tensor, "batch channels _height _width"]
Kernels = Float[Tensor, "channels 1 _rows _columns"]
Pair = Sequence[int]  # of rows and of columns


class FastDepthwise(TorchFunctionMode):
    """Networks that run within it train such layers so; all else is as it was. It is made for 32 bits on a CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.conv2d and not kwargs and _is_slow(*args):
            return _SmallDepthwise.apply(*args[:6])
        return func(*args, **(kwargs or {}))


def _is_slow(
    maps: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> bool:
    is_depthwise = groups == maps.shape[1] == weight.shape[0]
    is_plain = all(isinstance(value, tuple) for value in (stride, padding, dilation))  # as layers of torch and timm are
    is_small = any(side < kernel for side, kernel in zip(maps.shape[2:], weight.shape[2:], strict=True))
    is_mixed = maps.dtype != weight.dtype or torch.is_autocast_enabled("cpu")
    return is_depthwise and is_plain and is_small and not is_mixed and maps.device.type == "cpu"


class _SmallDepthwise(torch.autograd.Function):
    """torch's, but for the gradient of the weights."""

    @staticmethod
    def forward(
        ctx: Any, maps: Maps, weight: Kernels, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair
    ) -> Tensor:
        ctx.save_for_backward(maps, weight)
        ctx.geometry = (stride, padding, dilation)
        return F.conv2d(maps, weight, bias, stride, padding, dilation, len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (maps, weight) = gradients, ctx.saved_tensors
        of_maps, of_weight, of_bias = ctx.needs_input_grad[:3]
        other_gradients = torch.ops.aten.convolution_backward(
            gradient, maps, weight, [len(weight)], *ctx.geometry, False, [0, 0], len(weight), [of_maps, False, of_bias]
        )
        own = compute_weight_gradient(maps, gradient, weight.shape, *ctx.geometry) if of_weight else None
        return other_gradients[0], own, other_gradients[2], None, None, None


def compute_weight_gradient(
    maps: Maps, gradient: Maps, shape: Sequence[int], stride: Pair, padding: Pair, dilation: Pair
) -> Kernels:
    """The gradient of a depthwise convolution's weights: for each place in the kernel, a product of shifted maps.

    Args:
        maps: what was convolved.
        gradient: that of what came of it.
        shape: of the weights.
    """
    found = gradient.new_zeros(shape)
    for row in range(shape[2]):
        above, below = _overlap(row * dilation[0] - padding[0], stride[0], maps.shape[2], gradient.shape[2])
        for column in range(shape[3]):
            left, right = _overlap(column * dilation[1] - padding[1], stride[1], maps.shape[3], gradient.shape[3])
            found[:, 0, row, column] = (maps[:, :, above, left] * gradient[:, :, below, right]).sum((0, 2, 3))
    return found


def _overlap(offset: int, stride: int, num_inputs: int, num_outputs: int) -> tuple[slice, slice]:
    """The inputs that a place in the kernel meets, and the outputs: for output i it meets input i * stride + offset."""
    first = max(0, -(offset // stride))
    end = max(first, min(num_outputs, (num_inputs - 1 - offset) // stride + 1))
    return slice(first * stride + offset, max(0, (end - 1) * stride + offset + 1), stride), slice(first, end)
