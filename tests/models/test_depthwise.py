import itertools

import pytest
import torch
from torch.nn import functional as F

from loupe.models.depthwise import FastDepthwise
from loupe.models.weights import build_backbone

SIDES, KERNELS, STRIDES, PADDINGS, DILATIONS = (1, 2, 3, 4, 6), (1, 2, 3, 5, 7), (1, 2, 3), (0, 1, 2, 3), (1, 2)
GEOMETRIES = [
    (side, kernel, stride, padding, dilation)
    for side, kernel, stride, padding, dilation in itertools.product(SIDES, KERNELS, STRIDES, PADDINGS, DILATIONS)
    if side + 2 * padding > dilation * (kernel - 1)  # the kernel fits
]


def compute(layer, maps, gradient):
    """The layer's answer, and the gradients of maps, weights and biases."""
    answer = layer(maps)
    return answer, torch.autograd.grad(answer, (maps, *layer.parameters()), gradient)


def is_ours(answer):
    return answer.grad_fn.name().startswith("_SmallDepthwise")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_are_those_of_torch_and_other_than_torchs_where_the_kernel_is_larger_than_the_map(memory_format):
    generator = torch.Generator().manual_seed(0)
    for side, kernel, stride, padding, dilation in GEOMETRIES:
        layer = torch.nn.Conv2d(6, 6, (kernel, max(1, kernel - 1)), stride, padding, dilation, groups=6).double()
        maps = torch.randn(3, 6, side, side + 1, dtype=torch.float64, generator=generator)
        maps = maps.to(memory_format=memory_format).requires_grad_()
        gradient = torch.randn(layer(maps).shape, dtype=torch.float64, generator=generator)
        plain, gradients = compute(layer, maps, gradient)
        with FastDepthwise():
            fast, ours = compute(layer, maps, gradient)
        assert is_ours(fast) == (side < kernel), (side, kernel)
        assert torch.equal(plain, fast)
        torch.testing.assert_close(ours, gradients)


def test_other_convolutions_are_left_alone():
    maps = torch.randn(2, 4, 2, 2, requires_grad=True)
    with FastDepthwise():
        for groups, outputs in ((1, 4), (2, 4), (4, 8)):
            assert not is_ours(torch.nn.Conv2d(4, outputs, 3, padding=1, groups=groups)(maps))
        assert not is_ours(torch.nn.Conv2d(4, 4, 3, padding="same", groups=4)(maps))
        with torch.autocast("cpu", torch.bfloat16):
            assert not is_ours(torch.nn.Conv2d(4, 4, 3, padding=1, groups=4)(maps))


def test_a_network_that_sees_small_images_has_the_gradients_it_had():
    torch.manual_seed(0)
    network = build_backbone("tf_efficientnet_lite0", "none").to(memory_format=torch.channels_last)
    images, targets = torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last), torch.arange(4)

    def learn():
        network.zero_grad()
        logits = network.train()(images)
        F.cross_entropy(logits, targets).backward()
        return [parameter.grad for parameter in network.parameters()]

    plain = learn()
    with FastDepthwise():
        fast = learn()
    torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-5)
