"""The course's own networks, known to timm by name once this module is imported.

All are made by `timm.create_model(name, in_chans=..., num_classes=..., drop_rate=...)`, and those whose layers depend
on the input's size by `img_size` too. There are no pretrained weights of them. VGG's configurations A, B, D and E and
residual networks are timm's own: vgg11, vgg13, vgg16, vgg19, resnet18 and so on.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vgg import VGG, cfgs
from torch import Tensor, nn

from loupe.models.windows import compute_output_size

ImageSize = int | tuple[int, int]
IMAGENET = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "crop_pct": 0.875}


def _describe(input_size: tuple[int, int, int], num_classes: int = 10, **others: Any) -> dict[str, Any]:
    """What timm keeps of a network; `fixed_input_size` says that its layers depend on `img_size`."""
    middle = (0.5,) * input_size[0]
    return {
        "input_size": input_size,
        "num_classes": num_classes,
        "fixed_input_size": True,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "mean": middle,
        "std": middle,
        "classifier": "head",
        **others,
    }


default_cfgs = generate_default_cfgs(
    {
        "dense_network": _describe((3, 256, 256)),
        "small_cnn": _describe((1, 64, 64), first_conv="features.conv1"),
        "lenet5": _describe((1, 32, 32), first_conv="features.c1"),
        "alexnet": _describe((3, 224, 224), 1000, first_conv="features.conv1", **IMAGENET),
        "vgg16_c": _describe(
            (3, 224, 224), 1000, fixed_input_size=False, first_conv="features.0", classifier="head.fc", **IMAGENET
        ),
    }
)


class FlatNetwork(nn.Module):
    """Features, which end as a map or as a vector; hidden layers, which flatten it; dropout; and a linear head."""

    def __init__(
        self,
        features: nn.Sequential,
        hidden: nn.Sequential,
        widths: tuple[int, int],
        num_classes: int,
        drop_rate: float,
    ) -> None:
        """`widths` are the channels of the features, and the units that the head sees."""
        super().__init__()
        self.features = features
        self.hidden = hidden
        self.num_features, self.head_hidden_size = widths
        self.drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """The number of the layer that a weight of that name belongs to, from the input on: timm's groups."""
        layers = list(dict.fromkeys(name.rpartition(".")[0] for name, _ in self.named_parameters()))
        return lambda name: layers.index(name.rpartition(".")[0])

    def reset_classifier(self, num_classes: int) -> None:
        """Make a new last layer."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.head_hidden_size, num_classes)

    def forward_features(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch ..."]:
        features: Tensor = self.features(images)
        return features

    def forward_head(
        self, features: Float[Tensor, "batch ..."], pre_logits: bool = False
    ) -> Float[Tensor, "batch num_outputs"]:
        """Logits, or with `pre_logits` what the head sees."""
        units: Tensor = self.drop(self.hidden(features))
        return units if pre_logits else self.head(units)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch num_classes"]:
        return self.forward_head(self.forward_features(images))


def _build_dense_network(img_size: ImageSize, in_chans: int, num_classes: int, drop_rate: float = 0.0) -> FlatNetwork:
    height, width = to_2tuple(img_size)
    layers = OrderedDict(
        flatten=nn.Flatten(),
        dense1=nn.Linear(in_chans * height * width, 100),
        relu1=nn.ReLU(),
        dense2=nn.Linear(100, 50),
        relu2=nn.ReLU(),
    )
    return FlatNetwork(nn.Sequential(layers), nn.Sequential(), (50, 50), num_classes, drop_rate)


def _build_small_cnn(img_size: ImageSize, in_chans: int, num_classes: int, drop_rate: float = 0.0) -> FlatNetwork:
    layers = OrderedDict(
        conv1=nn.Conv2d(in_chans, 32, 5),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(32, 16, 5),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
    )
    features, hidden = nn.Sequential(layers), nn.Sequential(OrderedDict(flatten=nn.Flatten()))
    return FlatNetwork(features, hidden, (16, 16 * _count_positions(features, img_size)), num_classes, drop_rate)


def _build_lenet5(img_size: ImageSize, in_chans: int, num_classes: int, drop_rate: float = 0.0) -> FlatNetwork:
    layers = OrderedDict(
        c1=nn.Conv2d(in_chans, 6, 5),
        relu1=nn.ReLU(),
        s2=nn.MaxPool2d(2),
        c3=nn.Conv2d(6, 16, 5),
        relu3=nn.ReLU(),
        s4=nn.MaxPool2d(2),
        c5=nn.Conv2d(16, 120, 5),
        relu5=nn.ReLU(),
    )
    features = nn.Sequential(layers)
    f6 = nn.Linear(120 * _count_positions(features, img_size), 84)
    hidden = nn.Sequential(OrderedDict(flatten=nn.Flatten(), f6=f6, relu6=nn.ReLU()))
    return FlatNetwork(features, hidden, (120, 84), num_classes, drop_rate)


def _build_alexnet(img_size: ImageSize, in_chans: int, num_classes: int, drop_rate: float = 0.5) -> FlatNetwork:
    layers = OrderedDict(
        conv1=nn.Conv2d(in_chans, 64, 11, stride=4, padding=2),
        relu1=nn.ReLU(inplace=True),
        pool1=nn.MaxPool2d(3, 2),
        conv2=nn.Conv2d(64, 192, 5, padding=2),
        relu2=nn.ReLU(inplace=True),
        pool2=nn.MaxPool2d(3, 2),
        conv3=nn.Conv2d(192, 384, 3, padding=1),
        relu3=nn.ReLU(inplace=True),
        conv4=nn.Conv2d(384, 256, 3, padding=1),
        relu4=nn.ReLU(inplace=True),
        conv5=nn.Conv2d(256, 256, 3, padding=1),
        relu5=nn.ReLU(inplace=True),
        pool5=nn.MaxPool2d(3, 2),
    )
    features = nn.Sequential(layers)
    hidden = OrderedDict(
        flatten=nn.Flatten(),
        fc6=nn.Linear(256 * _count_positions(features, img_size), 4096),
        relu6=nn.ReLU(inplace=True),
        drop6=nn.Dropout(drop_rate),
        fc7=nn.Linear(4096, 4096),
        relu7=nn.ReLU(inplace=True),
    )
    return FlatNetwork(features, nn.Sequential(hidden), (256, 4096), num_classes, drop_rate)


def _count_positions(features: nn.Sequential, img_size: ImageSize) -> int:
    """Height times width of the map that convolutions and poolings of square windows make."""
    sides: tuple[int, int] = to_2tuple(img_size)
    for layer in features:
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d):
            kernel, stride, padding = (
                value if isinstance(value, int) else int(value[0])
                for value in (layer.kernel_size, layer.stride, layer.padding)
            )
            height, width = (compute_output_size(side, kernel, stride, padding) for side in sides)
            sides = height, width
    return math.prod(sides)


class _VggC(VGG):
    """Configuration D as timm builds it, with 1 x 1 in place of the last 3 x 3 of each of the last three blocks."""

    def __init__(self, **options: Any) -> None:
        super().__init__(cfgs["vgg16"], **options)
        ends = [position for position, layer in enumerate(self.features) if isinstance(layer, nn.MaxPool2d)]
        for end, channels in zip(ends[2:], (256, 512, 512), strict=True):
            self.features[end - 2] = nn.Conv2d(channels, channels, 1)
        self._initialize_weights()


@register_model
def dense_network(pretrained: bool = False, **options: Any) -> nn.Module:
    """The baseline: every pixel to 100 and 50 units with ReLU, then to the classes. It knows nothing of neighbours."""
    return build_model_with_cfg(_build_dense_network, "dense_network", pretrained, **options)


@register_model
def small_cnn(pretrained: bool = False, **options: Any) -> nn.Module:
    """Two convolutions of 5 x 5 (32 and 16 channels) with ReLU and 2 x 2 max pooling, then a linear head."""
    return build_model_with_cfg(_build_small_cnn, "small_cnn", pretrained, **options)


@register_model
def lenet5(pretrained: bool = False, **options: Any) -> nn.Module:
    """LeNet-5 of LeCun et al., "Gradient-based learning applied to document recognition", 1998, figure 2.

    Modern about it: ReLU where the paper has a scaled tanh, max pooling where it has averages with a learnt factor,
    C3 sees all maps of S2 rather than the choice of table 1, and logits for cross-entropy rather than distances to
    drawn digits.
    """
    return build_model_with_cfg(_build_lenet5, "lenet5", pretrained, **options)


@register_model
def alexnet(pretrained: bool = False, **options: Any) -> nn.Module:
    """AlexNet with one tower: Krizhevsky, "One weird trick for parallelizing convolutional neural networks", 2014.

    It has torchvision's widths, and neither the two GPUs nor the response normalisation of the paper of 2012. The map
    is flattened as it is, where torchvision pools it to 6 x 6 first; at 224 x 224 the two are the same.
    """
    return build_model_with_cfg(_build_alexnet, "alexnet", pretrained, **options)


@register_model
def vgg16_c(pretrained: bool = False, **options: Any) -> nn.Module:
    """VGG, configuration C: Simonyan and Zisserman, "Very deep convolutional networks", 2015, table 1."""
    return build_model_with_cfg(_VggC, "vgg16_c", pretrained, **options)
