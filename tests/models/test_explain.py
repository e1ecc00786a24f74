import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from loupe.errors import ConfigError, WeightsError
from loupe.models.explain import explain_network
from loupe.models.receptive_field import WHOLE_IMAGE, FieldTracker
from loupe.models.windows import extend_receptive_field


def fields_of(name, **options):
    return {layer.name: layer.receptive_field for layer in explain_network(name, **options).layers}


def last_local_field(name):
    return [field for field in fields_of(name).values() if field][-1]


def track(network, side=64):
    """The field of a network's output."""
    image = torch.empty(1, 3, side, side, device="meta")
    with torch.no_grad(), FieldTracker(image) as tracker:
        return tracker.get_field(network.to("meta").eval()(image))


def measure_fields(network, channels, side):
    """The slow way: from the middle unit of each map back to the pixels whose gradient is not zero."""
    network = network.double().eval()
    for parameter in network.parameters():
        nn.init.constant_(parameter, 1 / 64)  # so that nothing cancels out, and every ReLU is open
    for parent in list(network.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.MaxPool2d):  # it passes the gradient of one pixel only
                setattr(parent, name, nn.AvgPool2d(layer.kernel_size, layer.stride, layer.padding))
    maps = {}
    for name, layer in network.named_modules():
        layer.register_forward_hook(lambda layer, inputs, output, name=name: maps.setdefault(name, output))
    image = torch.ones(1, channels, side, side, dtype=torch.float64, requires_grad=True)
    network.forward_features(image)
    return {name: measure_extent(output, image) for name, output in maps.items()}


def measure_extent(output, image):
    middle = output[0, :, output.shape[2] // 2, output.shape[3] // 2].sum()
    (gradient,) = torch.autograd.grad(middle, image, retain_graph=True)
    seen = gradient[0].abs().sum(dim=0) > 0
    return tuple(int(seen.any(dim=axis).sum()) for axis in (1, 0))


def test_lenet5_layer_by_layer():
    explanation = explain_network("lenet5")
    assert explanation.input_shape == (1, 32, 32)
    assert explanation.layers == [
        ("features.c1", "Conv2d 5x5", (6, 28, 28), 156, (5, 5)),
        ("features.s2", "MaxPool2d 2x2 /2", (6, 14, 14), 0, (6, 6)),
        ("features.c3", "Conv2d 5x5", (16, 10, 10), 2_416, (14, 14)),
        ("features.s4", "MaxPool2d 2x2 /2", (16, 5, 5), 0, (16, 16)),
        ("features.c5", "Conv2d 5x5", (120, 1, 1), 48_120, (32, 32)),
        ("hidden.flatten", "Flatten", (120,), 0, (32, 32)),
        ("hidden.f6", "Linear", (84,), 10_164, None),
        ("head", "Linear", (10,), 850, None),
    ]
    assert explanation.num_parameters == 61_706
    assert explanation.num_bytes == 4 * 61_706


def test_multiply_adds_are_weights_times_the_places_where_they_are_used():
    by_hand = 28 * 28 * 6 * 25 + 10 * 10 * 16 * 6 * 25 + 120 * 16 * 25 + 84 * 120 + 10 * 84
    assert explain_network("lenet5").num_multiply_adds == by_hand


def test_size_channels_and_classes_are_taken():
    explanation = explain_network("lenet5", size=(40, 64), channels=3, num_classes=7)
    assert explanation.input_shape == (3, 40, 64)
    assert [layer.output_shape for layer in explanation.layers] == [
        *[(6, 36, 60), (6, 18, 30), (16, 14, 26), (16, 7, 13), (120, 3, 9), (3240,), (84,)],
        (7,),
    ]


@pytest.mark.parametrize("name", ["dense_network", "alexnet", "vgg16_c", "resnet18", "test_efficientnet", "test_vit"])
def test_the_layers_parameters_sum_to_the_networks(name):
    explanation = explain_network(name)
    expected = sum(values.numel() for values in timm.create_model(name).parameters())
    assert sum(layer.num_parameters for layer in explanation.layers) == explanation.num_parameters == expected


@pytest.mark.parametrize(
    ("name", "channels", "side"), [("lenet5", 1, 96), ("small_cnn", 1, 64), ("resnet18", 3, 256), ("alexnet", 3, 400)]
)
def test_receptive_fields_are_where_gradients_are_not_zero(name, channels, side):
    size = {} if name == "resnet18" else {"img_size": side}
    network = timm.create_model(name, **size)
    if name == "resnet18":  # the fields of the last two stages are larger than an image that is quick to go through
        network.layer3 = network.layer4 = nn.Identity()
    measured = measure_fields(network, channels, side)
    fields = fields_of(name, size=(side, side))
    compared = [layer for layer, field in fields.items() if field and layer in measured and "flatten" not in layer]
    assert {layer: fields[layer] for layer in compared} == {layer: measured[layer] for layer in compared}
    assert len(compared) >= 4


@pytest.mark.parametrize(
    ("name", "field"), [("alexnet", 195), ("mobilenetv1_100", 315), ("inception_resnet_v2", 3039), ("resnet18", 435)]
)
def test_receptive_fields_are_those_of_the_published_table(name, field):
    """All but resnet18, which is by hand, are in the README of google-research/receptive_field."""
    assert last_local_field(name) == (field, field)


def test_vgg_sees_212_pixels_at_its_last_pooling_and_404_behind_its_convolved_head():
    fields = fields_of("vgg16")
    assert fields["features.30"] == (212, 212)
    assert fields["pre_logits.fc1"] == (404, 404)


def test_a_shortcut_does_not_shorten_the_receptive_field():
    fields = fields_of("resnet18")
    assert fields["layer2.0.downsample.0"] == (43, 43)
    assert fields["layer2.0.conv2"] == (67, 67)
    assert fields["layer2.1.conv1"] == (83, 83)


@pytest.mark.parametrize("name", ["efficientnet_b0", "ecaresnet26t", "test_efficientnet"])
def test_gates_that_see_the_whole_image_are_left_out(name):
    layers = explain_network(name).layers
    assert [layer for layer in layers if len(layer.output_shape) == 3 and layer.output_shape[1] > 1][-1].receptive_field


def test_attention_sees_the_whole_image_and_patches_do_not():
    fields = fields_of("test_vit")
    assert fields["patch_embed.proj"] == (16, 16)
    assert fields["blocks.0.norm1"] == (16, 16)
    assert fields["blocks.0.attn.proj"] is None
    assert fields["blocks.0.norm2"] is None


def test_dense_layers_at_each_position_keep_the_receptive_field():
    """ConvNeXt: 4 x 4 at a stride of 4, then blocks of 7 x 7, a block's two dense layers on channels last."""
    fields = fields_of("convnext_atto")
    assert fields["stem.0"] == (4, 4)
    assert fields["stages.0.blocks.0.conv_dw"] == fields["stages.0.blocks.0.mlp.fc2"] == (28, 28)


def test_dilated_and_oblong_kernels_extend_each_axis_by_its_own():
    layers = nn.Sequential(nn.Conv2d(3, 1, (3, 1), dilation=2), nn.Conv2d(1, 1, (1, 3), stride=(1, 2)), nn.AvgPool2d(2))
    assert track(layers)[:2] == ((6, 5), (2, 4))


class Gated(nn.Module):
    """A map scaled at each position by what a larger window sees, as in CBAM."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Conv2d(1, 1, 7, padding=3)

    def forward(self, images):
        return images * self.gate(images.mean(dim=1, keepdim=True)).sigmoid()


def test_gates_of_a_window_count():
    assert track(Gated()).size == (7, 7)


class Enlarging(nn.Module):
    """Halves a map, and brings it back."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 3, 3, stride=2, padding=1), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, images):
        return self.up(F.interpolate(self.down(images), scale_factor=2.0)) + images


def test_enlarging_a_map_brings_its_units_nearer():
    assert track(Enlarging())[:2] == ((3 + 2 + 2, 3 + 2 + 2), (1, 1))


@pytest.mark.parametrize("layers", [[nn.AdaptiveAvgPool2d(1)], [nn.AdaptiveMaxPool2d(1), nn.Flatten()]])
def test_behind_a_global_pooling_is_the_whole_image(layers):
    assert track(nn.Sequential(nn.Conv2d(3, 3, 3), *layers)) == WHOLE_IMAGE


def test_the_recurrence_is_the_closed_form_of_a_single_path():
    """Araujo et al.: one plus the sum of (kernel - 1) times the strides before it."""
    windows = [(11, 4), (3, 2), (5, 1), (3, 2), (3, 1), (3, 1), (3, 1), (3, 2)]
    field, jump, expected, strides = 1, 1, 1, 1
    for kernel, stride in windows:
        field, jump = extend_receptive_field(field, jump, kernel, stride)
        expected, strides = expected + (kernel - 1) * strides, strides * stride
        assert (field, jump) == (expected, strides)
    assert field == 195


@pytest.mark.parametrize("name", ["vgg19", "cait_xxs24_224", "pit_ti_224", "eca_vovnet39b"])
def test_networks_that_are_large_or_unusual_are_explained(name):
    explanation = explain_network(name)
    assert explanation.layers[-1].output_shape == (1000,)
    assert explanation.num_multiply_adds > explanation.num_parameters


def test_an_unknown_network_names_the_nearest():
    with pytest.raises(WeightsError, match=r"no backbone 'lenet6'; nearest names: lenet5"):
        explain_network("lenet6")


def test_a_size_too_small_names_the_smallest():
    with pytest.raises(ConfigError, match="lenet5 needs images of at least 32 x 32 pixels, got 28 x 40"):
        explain_network("lenet5", size=(28, 40))
