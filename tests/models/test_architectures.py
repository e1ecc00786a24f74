import itertools

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from loupe.errors import ConfigError, WeightsError
from loupe.models.classifiers import (
    ClassifierConfig,
    build_classifier,
    choose_channels,
    get_data_config,
    load_classifier,
    save_classifier,
)
from loupe.models.files import save_weights
from loupe.models.input_size import build_shapes, check_input_size, find_smallest_side
from loupe.models.weights import build_backbone
from loupe.models.windows import compute_output_size

# Sides at which each is quick to train.
SIDES = {"dense_network": 16, "small_cnn": 16, "lenet5": 32, "alexnet": 63, "vgg16_c": 32}
OURS = list(SIDES)
# What makes each small: VGG's size is in its hidden layers, and not in the image's.
SMALL = {name: {"img_size": side} for name, side in SIDES.items()} | {"vgg16_c": {"mlp_ratio": 1 / 64}}
windows = st.fixed_dictionaries(
    {
        "kernel": st.integers(1, 5),
        "stride": st.integers(1, 4),
        "padding": st.integers(0, 4),
        "dilation": st.integers(1, 3),
    }
)


def count_parameters(network):
    return sum(values.numel() for values in network.parameters())


def draw_pixels(num_images, channels, side):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num_images, channels, side, side), dtype=torch.uint8, generator=generator)


def config_of(backbone, channels=3, size=None):
    size = size or (SIDES[backbone],) * 2
    return ClassifierConfig(backbone, ["cat", "cow"], (32, 32), size, (0.5,) * channels, (0.5,) * channels, channels)


@settings(deadline=None)  # the first call of a layer may take long
@given(st.integers(1, 40), windows)
def test_the_side_of_a_map_is_torchs(size, window):
    layer = nn.Conv1d(1, 1, window["kernel"], window["stride"], window["padding"], window["dilation"])
    try:
        expected = layer(torch.zeros(1, size)).shape[1]
    except RuntimeError:
        with pytest.raises(ValueError, match="must fit into"):
            compute_output_size(size, **window)
    else:
        assert compute_output_size(size, **window) == expected


def test_a_stride_of_two_and_a_pooling_of_four_take_256_to_125():
    assert compute_output_size(compute_output_size(256, 3, stride=2, padding=1), 4) == 125
    layers = nn.Sequential(nn.Conv2d(1, 1, 3, stride=2, padding=1), nn.MaxPool2d(4, stride=1))
    assert layers(torch.zeros(1, 1, 256, 256)).shape[2:] == (125, 125)


@pytest.mark.parametrize(("side", "expected"), [(256, 19_666_460), (1024, 314_578_460)])
def test_a_dense_network_grows_with_the_image(side, expected):
    assert count_parameters(build_shapes("dense_network", (side, side), 3)) == expected


def test_six_filters_of_5_x_5_x_3_have_456_parameters_whatever_the_image():
    for side in (32, 256):
        first = build_shapes("lenet5", (side, side), 3).features.c1
        assert (count_parameters(first), first.weight.numel()) == (456, 450)


@pytest.mark.parametrize(
    ("name", "millions"), [("vgg11", 133), ("vgg13", 133), ("vgg16_c", 134), ("vgg16", 138), ("vgg19", 144)]
)
def test_the_configurations_of_vgg_have_the_papers_parameters(name, millions):
    assert round(count_parameters(build_shapes(name, (224, 224), 3)) / 1e6) == millions


def test_configuration_c_is_d_with_three_convolutions_of_one_pixel():
    c, d = (build_shapes(name, (224, 224), 3).features for name in ("vgg16_c", "vgg16"))
    kernels = [[layer.kernel_size[0] for layer in features if isinstance(layer, nn.Conv2d)] for features in (c, d)]
    assert kernels == [[3] * 6 + [1, 3, 3, 1, 3, 3, 1], [3] * 13]
    images = torch.empty(2, 3, 224, 224, device="meta")
    assert [layer(images).shape for layer in (c, d)] == [(2, 512, 7, 7)] * 2


@pytest.mark.parametrize(("name", "expected"), [("small_cnn", 40_698), ("lenet5", 61_706), ("alexnet", 61_100_840)])
def test_a_network_of_its_own_size_has_the_known_parameters(name, expected):
    with torch.device("meta"):
        assert count_parameters(timm.create_model(name)) == expected


@torch.inference_mode()
def test_alexnet_with_torchvisions_weights_gives_torchvisions_logits():
    theirs, ours = torchvision.models.alexnet(weights=None).eval(), timm.create_model("alexnet").eval()
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(images), theirs(images))


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("name", OURS)
def test_other_sizes_channels_and_classes_are_taken(name, channels):
    images = torch.empty(2, channels, 96, 160, device="meta")
    network = build_shapes(name, (96, 160), channels, num_classes=7)
    assert network(images).shape == (2, 7)
    assert network.forward_features(images).shape[1] == network.num_features


@pytest.mark.parametrize("name", OURS)
def test_the_head_sees_the_features(name):
    network = build_backbone(name, "none", in_chans=2, **SMALL[name]).eval()
    network.reset_classifier(5)
    images = torch.rand(2, 2, SIDES[name], SIDES[name])
    with torch.inference_mode():
        features = network.forward_head(network.forward_features(images), pre_logits=True)
        assert features.shape == (2, network.get_classifier().in_features) == (2, network.head_hidden_size)
        torch.testing.assert_close(network.get_classifier()(features), network(images))
    assert network.num_classes == 5


@pytest.mark.parametrize("name", OURS)
def test_a_few_steps_lower_the_loss(name):
    torch.manual_seed(0)
    side = SIDES[name]
    network = timm.create_model(name, in_chans=1, num_classes=2, drop_rate=0.0, **SMALL[name])
    targets = torch.tensor([0, 1] * 4)
    images = torch.rand(8, 1, side, side) + targets[:, None, None, None]
    optimizer = torch.optim.SGD(network.parameters(), 0.02)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(network(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(loss < before for before, loss in itertools.pairwise(losses)), losses


@pytest.mark.parametrize("name", OURS)
def test_there_are_no_pretrained_weights_of_ours(name):
    with pytest.raises(RuntimeError, match=f"No pretrained weights exist for {name}"):
        timm.create_model(name, pretrained=True)


def test_weights_of_the_hub_are_an_error_that_names_the_ways():
    with pytest.raises(WeightsError, match=r"hub has no weights of 'lenet5' within reach .*`none` for random"):
        build_classifier(config_of("lenet5"), "hub")


def test_a_misspelt_network_of_ours_is_found():
    with pytest.raises(WeightsError, match="nearest names: lenet5"):
        build_backbone("lenet", "none")


def test_the_data_configs_of_ours_are_of_their_own_channels():
    assert get_data_config("lenet5") == (32, 1.0, "bilinear", (0.5,), (0.5,))
    assert get_data_config("vgg16_c") == get_data_config("vgg16.tv_in1k")


def test_a_data_config_of_other_channels_has_the_average_in_each():
    resnet, lenet = get_data_config("test_resnet"), get_data_config("lenet5")
    assert resnet.fit_channels(3) == resnet
    assert resnet.fit_channels(1).mean == (pytest.approx(sum(resnet.mean) / 3),)
    assert lenet.fit_channels(3).std == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("backbone", "weights", "image_channels", "expected"),
    [
        ("lenet5", "none", 1, 1),
        ("lenet5", "none", 3, 3),
        ("dense_network", "none", 1, 1),
        ("lenet5", "here.safetensors", 1, 1),
        ("lenet5", "here.safetensors", 3, 3),
        ("test_resnet", "none", 1, 1),
        ("test_resnet", "hub", 1, 3),
        ("tf_efficientnet_lite0", "package", 1, 3),
    ],
)
def test_a_random_network_sees_the_images_channels_and_a_pretrained_one_its_own(
    backbone, weights, image_channels, expected
):
    assert choose_channels(backbone, weights, image_channels) == expected


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["dense_network", "small_cnn", "lenet5", "alexnet"])
@torch.inference_mode()
def test_a_saved_classifier_of_ours_is_built_again_for_its_size_and_channels(tmp_path, name, channels):
    saved = build_classifier(config_of(name, channels, (64, 72)), "none").eval()
    save_classifier(saved, {}, tmp_path)
    loaded = load_classifier(tmp_path)
    images = draw_pixels(3, channels, 32)
    assert loaded.config == saved.config
    assert loaded(images).shape == (3, 2)
    torch.testing.assert_close(loaded(images), saved(images))
    torch.testing.assert_close(loaded.head(loaded.compute_features(images)), saved(images))


def test_a_network_of_one_channel_gets_grey_images_as_they_are():
    classifier = build_classifier(config_of("lenet5", channels=1), "none")
    assert classifier.preprocess(draw_pixels(2, 1, 32)).shape == (2, 1, 32, 32)
    assert classifier.backbone.features.c1.weight.shape == (6, 1, 5, 5)


def test_a_file_of_weights_fits_the_size_that_it_was_trained_on(tmp_path):
    path = tmp_path / "lenet5.safetensors"
    save_weights(build_backbone("lenet5", "none").state_dict(), path)
    build_classifier(config_of("lenet5", 1), str(path))
    with pytest.raises(WeightsError, match="don't fit the network"):
        build_classifier(config_of("lenet5", 1, (64, 64)), str(path))


@pytest.mark.parametrize(("name", "smallest"), [("small_cnn", 16), ("lenet5", 32), ("alexnet", 63), ("vgg16_c", 32)])
@torch.inference_mode()
def test_the_smallest_side_is_the_smallest_that_torch_takes(name, smallest):
    assert find_smallest_side(name, 3) == smallest
    features = timm.create_model(name, in_chans=3, **SMALL[name]).features
    assert features(torch.zeros(1, 3, smallest, smallest)).numel() > 0
    with pytest.raises(RuntimeError, match=r"Kernel size can't be greater|Output size is too small"):
        features(torch.zeros(1, 3, smallest - 1, smallest - 1))


@pytest.mark.parametrize(
    ("name", "height", "width", "said"),
    [
        ("lenet5", 28, 28, r"lenet5 needs images of at least 32 x 32 pixels, got 28 x 28: choose a larger input size"),
        ("vgg19", 224, 31, r"vgg19 needs images of at least 32 x 32 pixels, got 224 x 31"),
        ("swin_tiny_patch4_window7_224", 1, 1, "needs images of at least 4 x 4 pixels"),
        ("maxvit_tiny_tf_224", 100, 100, "can't take images of 100 x 100 pixels: height .* must be divisible"),
    ],
)
def test_a_size_that_a_network_can_not_take_is_said(name, height, width, said):
    with pytest.raises(ConfigError, match=said):
        check_input_size(name, height, width, 3)


def test_a_size_that_a_network_can_take_is_no_error_and_draws_nothing():
    before = torch.get_rng_state()
    check_input_size("lenet5", 32, 40, 1)
    check_input_size("resnet18", 1, 1, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_classifier_is_built_for_images_too_small():
    with pytest.raises(ConfigError, match="at least 32 x 32"):
        build_classifier(config_of("lenet5", size=(28, 28)), "none")
