import numpy as np
import pytest
import torch

from loupe.errors import ConfigError, WeightsError
from loupe.models.classifiers import (
    ClassifierConfig,
    build_classifier,
    compute_targets,
    get_data_config,
    load_classifier,
    predict_probabilities,
    save_classifier,
)
from loupe.models.files import load_config

LABELS = ["cat", "cow", "dog"]


def config_of(backbone="test_resnet", crop=(28, 28), size=(64, 64)):
    return ClassifierConfig(backbone, LABELS, crop, size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    return build_classifier(config_of(), "none").eval()


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_the_data_config_is_timms():
    assert get_data_config("tf_efficientnet_lite0") == (224, 0.875, "bicubic", (0.5,) * 3, (0.5,) * 3)


def test_the_data_config_of_an_unknown_backbone_is_a_weights_error():
    with pytest.raises(WeightsError, match="timm has no backbone"):
        get_data_config("tf_efficientnet_light0")


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_either_depth_become_one_logit_a_label(classifier, images, channels):
    assert classifier(images[:, :channels]).shape == (5, 3)


def test_the_head_sees_the_features(classifier, images):
    features = classifier.compute_features(images)
    torch.testing.assert_close(classifier.head(features), classifier(images))


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet", "test_vit"])
@torch.inference_mode()
def test_a_saved_classifier_gives_the_same_logits(tmp_path, images, backbone):
    size = (160, 160) if backbone == "test_vit" else (64, 64)  # its positions are of one size
    saved = build_classifier(config_of(backbone, size=size), "none").eval()
    save_classifier(saved, {}, tmp_path)
    loaded = load_classifier(tmp_path)
    assert not loaded.training
    assert loaded.config == saved.config
    torch.testing.assert_close(loaded(images), saved(images))


@torch.inference_mode()
def test_a_saved_classifier_with_packaged_weights_gives_the_same_logits(tmp_path, images):
    saved = build_classifier(config_of("tf_efficientnet_lite0"), "package").eval()
    save_classifier(saved, {}, tmp_path)
    torch.testing.assert_close(load_classifier(tmp_path)(images), saved(images))


def test_what_was_learnt_by_batch_normalisation_is_saved(tmp_path, images):
    saved = build_classifier(config_of(), "none").train()
    saved(images)
    save_classifier(saved.eval(), {}, tmp_path)
    with torch.inference_mode():
        torch.testing.assert_close(load_classifier(tmp_path)(images), saved(images))


def test_a_saved_classifier_is_safetensors_and_json_with_what_came_beside_it(tmp_path, classifier):
    save_classifier(classifier, {"geometry": {"height": 32}}, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert load_config(tmp_path)["geometry"] == {"height": 32}
    assert load_config(tmp_path)["classifier"]["labels"] == LABELS


def test_probabilities_are_the_softmax_of_the_logits_whatever_the_batches(classifier, images):
    expected = classifier(images).detach().softmax(dim=1)
    for batch_size in (1, 2, 5, 128):
        probabilities = predict_probabilities(classifier, images, batch_size)
        torch.testing.assert_close(probabilities, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(expected.sum(dim=1), torch.ones(5))


def test_the_head_alone_is_new(images):
    first, second = (build_classifier(config_of("tf_efficientnet_lite0"), "package").eval() for _ in range(2))
    with torch.inference_mode():
        torch.testing.assert_close(first.compute_features(images), second.compute_features(images))
    assert not torch.equal(first.head.weight, second.head.weight)


def test_unknown_weights_make_no_classifier():
    with pytest.raises(WeightsError, match="`weights` must be one of"):
        build_classifier(config_of(), "imagenet")


def test_targets_are_positions_in_the_order_of_classes():
    assert list(compute_targets(np.array(["b", "a", "b"]), ["a", "b"])) == [1, 0, 1]


@pytest.mark.parametrize(("drop_rate", "expected"), [(None, {0.5}), (0.0, {0.0}), (0.3, {0.3})])
def test_dropout_is_the_networks_own_where_none_is_set(drop_rate, expected):
    classifier = build_classifier(config_of("alexnet"), "none", drop_rate=drop_rate)
    rates = {module.p for module in classifier.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates | {getattr(classifier.backbone, "drop_rate", drop_rate)} - {None} >= expected


def test_a_network_without_residual_branches_can_not_leave_some_out():
    with pytest.raises(ConfigError, match=r"lenet5 has no residual branches.*drop_path to auto"):
        build_classifier(config_of("lenet5"), "none", drop_path=0.1)
