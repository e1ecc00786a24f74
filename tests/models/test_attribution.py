"""Where networks look, on networks that are built to look somewhere."""

import numpy as np
import pytest
import torch
from torch import nn

from loupe.models.attribution import compute_filters, compute_grad_cam, compute_responses, find_last_map
from loupe.models.classifiers import Classifier, ClassifierConfig, build_classifier


def build(backbone, side, channels=3):
    torch.manual_seed(0)
    middle = (0.5,) * channels
    config = ClassifierConfig(backbone, ["cat", "dog", "owl"], (side, side), (side, side), middle, middle, channels)
    return build_classifier(config, "none").eval()


def draw_images(number, side, channels=3):
    pixels = np.random.default_rng(0).integers(0, 256, (number, channels, side, side), dtype=np.uint8)
    return torch.from_numpy(pixels)


class Looker(nn.Module):
    """Its first map is brightness, its second darkness; class 0 is the mean of the first, class 1 of the second."""

    num_features = 2

    def __init__(self):
        super().__init__()
        self.maps = nn.Conv2d(1, 2, 1, bias=False)
        self.maps.weight = nn.Parameter(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))

    def forward_features(self, images):
        return self.maps(images)

    def forward(self, images):
        return self.forward_features(images).mean(dim=(2, 3))


@pytest.fixture
def looker():
    config = ClassifierConfig("looker", ["bright", "dark"], (8, 8), (8, 8), (0.5,), (0.5,), 1)
    return Classifier(config, Looker()).eval()


def test_the_map_is_where_the_network_finds_what_speaks_for_a_label(looker):
    images = torch.full((2, 1, 8, 8), 127, dtype=torch.uint8)
    images[:, :, 2:4, 5:7] = 255
    images[:, :, 6, 1] = 0
    bright, dark = compute_grad_cam(looker, images, np.array([0, 1]))
    assert bright.shape == (8, 8)
    assert (bright == 1).nonzero()[0].tolist() == [2, 2, 3, 3]
    assert bright[0, 0] == 0
    assert np.unravel_index(dark.argmax(), dark.shape) == (6, 1)
    assert dark.max() == 1


def test_where_nothing_speaks_for_a_label_the_map_is_empty(looker):
    images = torch.zeros((1, 1, 8, 8), dtype=torch.uint8)
    assert compute_grad_cam(looker, images, np.array([0])).tolist() == np.zeros((1, 8, 8)).tolist()


@pytest.mark.parametrize(
    ("backbone", "side", "channels", "name", "shape"),
    [
        ("small_cnn", 32, 1, "features", (5, 5)),
        ("lenet5", 32, 1, "features.s4", (5, 5)),  # what follows has one place alone
        ("alexnet", 96, 3, "features", (2, 2)),
        ("resnet18", 64, 3, "layer4", (2, 2)),
        ("tf_efficientnet_lite0", 96, 3, "bn2", (3, 3)),
    ],
)
def test_the_last_map_is_found_in_any_network(backbone, side, channels, name, shape):
    classifier = build(backbone, side, channels)
    names = [one for one, layer in classifier.backbone.named_modules() if layer is find_last_map(classifier)]
    assert names == [name]
    maps = compute_grad_cam(classifier, draw_images(2, side, channels), np.array([0, 2]))
    assert maps.shape == (2, *shape)
    assert ((maps >= 0) & (maps <= 1)).all()


@pytest.mark.parametrize(("backbone", "side"), [("dense_network", 32), ("vit_tiny_patch16_224", 32)])
def test_networks_that_end_in_no_map_have_none(backbone, side):
    classifier = build(backbone, side)
    assert find_last_map(classifier) is None
    assert compute_grad_cam(classifier, draw_images(1, side), np.array([0])) is None


def test_maps_do_not_depend_on_the_batch_and_leave_no_gradients():
    classifier = build("small_cnn", 32, 1)
    images, targets = draw_images(11, 32, 1), np.arange(11) % 3
    together = compute_grad_cam(classifier, images, targets)
    alone = [compute_grad_cam(classifier, images[[row]], targets[[row]])[0] for row in range(11)]
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-5)
    assert all(parameter.grad is None for parameter in classifier.parameters())


def test_filters_are_the_first_kernels_as_pictures():
    classifier = build("alexnet", 96)
    kernels = classifier.backbone.features.conv1.weight
    filters = compute_filters(classifier)
    assert filters.shape == (64, 11, 11, 3)
    assert ((filters == 255) | (filters == 0)).any(axis=(1, 2, 3)).all()
    assert ((filters > 128) <= (kernels.detach().numpy() > 0).transpose(0, 2, 3, 1)).all()


def test_a_filter_without_weights_is_grey(looker):
    nn.init.zeros_(looker.backbone.maps.weight)
    assert compute_filters(looker).tolist() == [[[[128]]], [[[128]]]]


def test_responses_are_what_the_first_convolution_makes_of_the_image(looker):
    image = torch.zeros((1, 8, 8), dtype=torch.uint8)
    image[0, 3, 4] = 255
    bright, dark = compute_responses(looker, image)[..., 0]
    assert bright[3, 4] == 255
    assert dark[3, 4] == 0
    assert bright[0, 0] == 0


def test_responses_are_taken_before_a_layer_writes_over_them():
    classifier = build("alexnet", 96)  # its ReLU works in place
    assert (compute_responses(classifier, draw_images(1, 96)[0]) < 100).any()


def test_a_dense_network_has_no_filters_and_no_responses():
    classifier = build("dense_network", 32)
    assert compute_filters(classifier) is None
    assert compute_responses(classifier, draw_images(1, 32)[0]) is None
