import hashlib

import pytest
import timm
import torch

from loupe.errors import WeightsError
from loupe.models.files import save_weights
from loupe.models.weights import PACKAGED, build_backbone, check_backbone, describe_source

LITE0 = "tf_efficientnet_lite0"
SMALL = "test_resnet"
WITHOUT_WEIGHTS = "darknet17"  # timm's hub has none for it, so nothing is asked of the network


@pytest.fixture(scope="module")
def packaged():
    return build_backbone(LITE0, "package").eval()


@pytest.fixture(scope="module")
def images():
    return torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_packaged_weights_fill_every_tensor(packaged):
    torch.manual_seed(0)
    random = timm.create_model(LITE0).state_dict()
    for key, value in packaged.state_dict().items():
        assert value.isfinite().all()
        if key.endswith("weight"):
            assert not torch.equal(value, random[key]), key


@torch.inference_mode()
def test_packaged_weights_give_other_features_than_random_ones(packaged, images):
    torch.manual_seed(0)
    random = build_backbone(LITE0, "none").eval()
    features, noise = packaged.forward_features(images), random.forward_features(images)
    assert features.shape == noise.shape
    assert not torch.allclose(features, noise, atol=0.1)


@torch.inference_mode()
def test_packaged_weights_tell_a_gradient_from_a_checkerboard(packaged):
    """Random weights give nearly one answer to all images; trained ones don't."""
    line = torch.linspace(-1, 1, 64)
    gradient = line.expand(3, 64, 64)
    board = ((torch.arange(64)[:, None] // 8 + torch.arange(64)[None] // 8) % 2 * 2.0 - 1).expand(3, 64, 64)
    first, second = packaged(torch.stack([gradient, board])).softmax(dim=1)
    assert first.argmax() != second.argmax()


def test_the_same_package_gives_the_same_weights(packaged):
    again = build_backbone(LITE0, "package").state_dict()
    assert all(torch.equal(value, again[key]) for key, value in packaged.state_dict().items())


def test_random_weights_are_had_by_name():
    assert build_backbone(SMALL, "none").num_classes == 1000


def test_a_backbone_that_no_package_carries_names_the_ways():
    with pytest.raises(WeightsError) as caught:
        build_backbone(SMALL, "package")
    assert str(caught.value).startswith(f"no package carries weights of '{SMALL}'; set `weights` to")
    for way in (LITE0, "`hub`", ".safetensors", "`none`"):
        assert way in str(caught.value)


@pytest.mark.parametrize("weights", ["imagenet", "", "weights.pth", "None"])
def test_an_unknown_source_names_the_ways(weights):
    with pytest.raises(WeightsError) as caught:
        build_backbone(SMALL, weights)
    message = str(caught.value)
    assert message.startswith("`weights` must be one of `package` (for ")
    assert message.endswith(f"or `none` for random weights; got {weights!r}")


def test_an_unknown_backbone_names_the_nearest():
    with pytest.raises(WeightsError, match=r"timm has no backbone 'resnet_18'; nearest names: .*resnet18"):
        build_backbone("resnet_18", "none")


def test_a_backbone_that_resembles_none_says_so():
    with pytest.raises(WeightsError, match="nearest names: none"):
        check_backbone("0123456789" * 5)


def test_a_hub_without_the_weights_is_an_error_that_names_the_ways_and_no_random_network():
    with pytest.raises(WeightsError) as caught:
        build_backbone(WITHOUT_WEIGHTS, "hub")
    message = str(caught.value)
    assert message.startswith(f"timm's hub has no weights of '{WITHOUT_WEIGHTS}' within reach (")
    assert "`none` for random weights" in message


def test_a_file_of_weights_is_loaded(tmp_path):
    torch.manual_seed(1)
    network = build_backbone(SMALL, "none")
    save_weights(network.state_dict(), tmp_path / "weights.safetensors")
    loaded = build_backbone(SMALL, str(tmp_path / "weights.safetensors")).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in network.state_dict().items())


def test_a_file_with_a_tensor_of_another_shape_names_the_first(tmp_path):
    state = build_backbone(SMALL, "none").state_dict()
    first, second = [key for key in state if key.endswith("conv1.weight")][:2]
    state[first], state[second] = torch.zeros(2), torch.zeros(2)
    save_weights(state, tmp_path / "weights.safetensors")
    with pytest.raises(WeightsError) as caught:
        build_backbone(SMALL, str(tmp_path / "weights.safetensors"))
    assert f"2 of its {len(state)} tensors differ in name or shape, first {first!r}" in str(caught.value)


def test_a_file_for_another_network_is_an_error(tmp_path):
    save_weights(build_backbone("test_efficientnet", "none").state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(WeightsError, match="choose the network they were made for"):
        build_backbone(SMALL, str(tmp_path / "weights.safetensors"))


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("package", f"ImageNet, package {PACKAGED[LITE0].package} (Apache-2.0)"),
        ("hub", "timm's hub"),
        ("none", "random"),
    ],
)
def test_a_source_is_described_in_words(weights, words):
    assert describe_source(LITE0, weights) == words


def test_a_file_is_known_by_what_it_holds(tmp_path):
    path = tmp_path / "here.safetensors"
    path.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    assert describe_source(LITE0, str(path)) == f"{path} (sha256 {digest[:12]})"
