"""How much of the image each tensor of a network sees, followed through every operation of one forward pass.

Residual branches, concatenations and poolings written as functions are no modules, so that hooks on modules would miss
them; a dispatch mode, which torch's own FlopCounterMode is too, sees them all.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from loupe.models.windows import extend_receptive_field

aten = torch.ops.aten
WINDOWED = {aten.convolution, aten.max_pool2d_with_indices, aten.avg_pool2d}
POOLED_TO_A_SIZE = {aten._adaptive_avg_pool2d, aten.adaptive_avg_pool2d, aten.adaptive_max_pool2d}
REDUCED = {aten.mean, aten.sum, aten.amax}
MULTIPLIED = {aten.mm, aten.addmm}
SCALED = {aten.mul, aten.mul_}


class Field(NamedTuple):
    """What the units of a tensor see of an image: sizes and jumps are (height, width) in pixels.

    `size` is None for the whole image. `jump` is the distance between what neighbouring units see, and
    `num_positions` how many places of the image the tensor tells apart.
    """

    size: tuple[int, int] | None
    jump: tuple[int, int] = (0, 0)
    num_positions: int = 1


WHOLE_IMAGE = Field(None)


class FieldTracker(TorchDispatchMode):
    """While it is entered, it notes the field of every tensor that is computed from an image.

    Convolutions and poolings extend the field; where branches meet, the largest counts. Pooling to one value, dense
    layers on a flattened map and attention see the whole image. It is an upper bound where a kernel has zeros, where
    attention has windows or pooling has bins, and where a map is enlarged by its nearest values. Three things are left
    out: gates that see the whole image and only scale the channels of a map (squeeze-excite), statistics of
    normalisation over a map (group norm), and pixels that are rearranged into channels.
    """

    def __init__(self, image: Float[Tensor, "1 channels height width"]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fields = WeakTensorKeyDictionary()
        self.fields[image] = Field((1, 1), (1, 1), image.shape[2] * image.shape[3])

    def get_field(self, outputs: object) -> Field | None:
        """The field of what a layer returned; None if it does not come from the image."""
        return _join([self.fields[tensor] for tensor in _list_tensors(outputs) if tensor in self.fields])

    def _without_gates(self, factors: object) -> list[Tensor]:
        """A gate has fewer values than what it scales, whether it is expanded to the same shape or not."""
        tensors = [tensor for tensor in _list_tensors(factors) if tensor in self.fields]
        most = max(map(_count_values, tensors), default=0)
        return [tensor for tensor in tensors if self.fields[tensor] != WHOLE_IMAGE or _count_values(tensor) == most]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        before = self.get_field(self._without_gates(args) if func.overloadpacket in SCALED else args)
        if before is not None:
            names = (argument.name for argument in func._schema.arguments)
            given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            after = _pass(func.overloadpacket, given, before, result)
            for tensor in _list_tensors(result):
                self.fields[tensor] = after
        return result


def _pass(operation: Any, given: Mapping[str, Any], before: Field, result: Any) -> Field:
    """The field behind an operation, whose arguments are given by name."""
    source = given.get("input", given.get("self"))
    if before.size is None or operation in POOLED_TO_A_SIZE or "attention" in str(operation):
        return WHOLE_IMAGE
    if operation in WINDOWED:
        return _slide(given, before, _list_tensors(result)[0]) if source.ndim == 4 else WHOLE_IMAGE
    if str(operation).startswith("aten.upsample"):
        return _enlarge(before, source, _list_tensors(result)[0])
    if operation in REDUCED:
        axes = given.get("dim") or range(source.ndim)
        return WHOLE_IMAGE if len(axes) > 1 or source.ndim < 4 else before
    if operation in MULTIPLIED:
        rows = given.get("mat1", source).shape[0]
        return before if rows == before.num_positions > 1 else WHOLE_IMAGE
    return WHOLE_IMAGE if operation is aten.bmm else before


def _slide(given: Mapping[str, Any], before: Field, result: Tensor) -> Field:
    kernel = given["weight"].shape[2:] if "weight" in given else given["kernel_size"]
    stride, dilation = given.get("stride") or kernel, given.get("dilation", (1, 1))
    assert before.size is not None  # the whole can't be extended
    (high, down), (wide, across) = (
        extend_receptive_field(*axis) for axis in zip(before.size, before.jump, kernel, stride, dilation, strict=True)
    )
    return Field((high, wide), (down, across), result.shape[2] * result.shape[3])


def _enlarge(before: Field, source: Tensor, result: Tensor) -> Field:
    """Interpolation sees a neighbour more, and brings what neighbours see nearer to each other."""
    assert before.size is not None  # the whole can't be extended
    (height, width), (down, across) = before.size, before.jump
    jump = (max(1, down * source.shape[2] // result.shape[2]), max(1, across * source.shape[3] // result.shape[3]))
    return Field((height + down, width + across), jump, result.shape[2] * result.shape[3])


def _join(fields: Sequence[Field]) -> Field | None:
    """The largest along each axis."""
    if not fields or any(field.size is None for field in fields):
        return WHOLE_IMAGE if fields else None
    heights, widths = zip(*(field.size for field in fields if field.size), strict=True)
    downs, acrosses = zip(*(field.jump for field in fields), strict=True)
    positions = min(field.num_positions for field in fields)
    return Field((max(heights), max(widths)), (max(downs), max(acrosses)), positions)


def _count_values(tensor: Tensor) -> int:
    """An expanded axis repeats its values, at a stride of 0."""
    return math.prod(size for size, step in zip(tensor.shape, tensor.stride(), strict=True) if step)


def _list_tensors(values: object) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [tensor for value in values for tensor in _list_tensors(value)] if isinstance(values, list | tuple) else []
