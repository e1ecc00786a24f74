import json
import logging

import grimp
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from loupe.models.classifiers import ClassifierConfig, build_classifier, predict_probabilities
from loupe.models.export import OPSET, ExportedModel, export_classifier

LABELS = ["cat", "cow", "dog"]
GEOMETRY = {"height": 28, "width": 28, "channels": 1, "fit": "crop", "interpolation": "bilinear"}


def build(backbone, weights="none", prepared=(28, 28), crop=(28, 28), size=(64, 64), image_channels=3, channels=3):
    """A classifier that is sure of what it says, so that small errors show; and five images for it."""
    torch.manual_seed(0)
    middle = (0.5,) * channels
    classifier = build_classifier(ClassifierConfig(backbone, LABELS, crop, size, middle, middle, channels), weights)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5, image_channels, *prepared), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        logits = classifier.eval()(images)
        classifier.head.weight /= logits.std(dim=0).mean() / 3
        classifier.head.bias -= classifier(images).mean(dim=0)
    return classifier, images


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    classifier, images = build("test_resnet")
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    export_classifier(classifier, images[:2], path, GEOMETRY)
    return classifier, images, path


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"backbone": "tf_efficientnet_lite0", "weights": "package", "image_channels": 1}, id="default"),
        pytest.param({"backbone": "resnet18", "prepared": (73, 73), "crop": (64, 64)}, id="resnet18_no_resize"),
        pytest.param({"backbone": "resnet18", "prepared": (75, 91), "crop": (75, 80)}, id="resnet18_shrinks"),
        pytest.param({"backbone": "lenet5", "image_channels": 1, "channels": 1, "size": (32, 32)}, id="lenet5"),
        pytest.param(
            {"backbone": "lenet5", "prepared": (80, 61), "crop": (71, 50), "size": (32, 32)}, id="lenet5_shrinks"
        ),
        pytest.param({"backbone": "small_cnn", "image_channels": 1, "channels": 1}, id="small_cnn"),
        pytest.param({"backbone": "dense_network"}, id="dense_network"),
        pytest.param({"backbone": "vgg16_c", "crop": (27, 25)}, id="vgg16_c"),
        pytest.param({"backbone": "test_vit", "size": (160, 160)}, id="vision_transformer"),
    ],
)
def test_the_file_gives_the_networks_probabilities_in_batches_of_any_size(tmp_path, options):
    classifier, images = build(**options)
    export_classifier(classifier, images[:2], tmp_path / "model.onnx", GEOMETRY)
    expected = predict_probabilities(classifier, images).numpy()
    assert np.ptp(expected, axis=0).max() > 0.3
    model = ExportedModel(tmp_path / "model.onnx")
    for batch_size in (1, 2, 5):
        parts = [model.run(images[start : start + batch_size].numpy())[0] for start in range(0, 5, batch_size)]
        actual = np.concatenate(parts)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)


def test_pixels_come_in_and_probabilities_out_of_any_number_of_images(exported):
    session = onnxruntime.InferenceSession(exported[2], providers=["CPUExecutionProvider"])
    (images,), (probabilities,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", ["batch", 3, 28, 28])
    assert (probabilities.name, probabilities.type) == ("probabilities", "tensor(float)")
    assert probabilities.shape == ["batch", 3]


def test_the_file_says_what_it_is(exported):
    model = onnx.load(exported[2])
    values = {entry.key: entry.value for entry in model.metadata_props}
    assert values.keys() == {"backbone", "labels", "geometry"}
    assert values["backbone"] == "test_resnet"
    assert json.loads(values["labels"]) == LABELS
    assert json.loads(values["geometry"]) == GEOMETRY
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", OPSET)]


def test_the_file_is_alone_in_its_folder_and_names_no_file_of_this_machine(exported, repository):
    assert [path.name for path in exported[2].parent.iterdir()] == ["model.onnx"]
    assert str(repository).encode() not in exported[2].read_bytes()
    assert b".py" not in exported[2].read_bytes()


def test_a_failed_export_leaves_the_old_file_and_nothing_else(tmp_path, exported, monkeypatch):
    classifier, images, _ = exported
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")

    def refuse(*_, **__):
        raise onnx.checker.ValidationError

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(onnx.checker.ValidationError):
        export_classifier(classifier, images[:2], path, GEOMETRY)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_weights_that_one_file_can_not_hold_lie_beside_it(tmp_path, monkeypatch):
    # The resnet's head has weights of 300, which show how sums are rounded: otherwise with one thread than with two.
    classifier, images = build("lenet5", size=(32, 32))
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 1000)
    export_classifier(classifier, images[:2], tmp_path / "model.onnx", GEOMETRY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    expected = predict_probabilities(classifier, images).numpy()
    np.testing.assert_allclose(ExportedModel(tmp_path / "model.onnx").run(images.numpy())[0], expected, atol=1e-5)


def test_the_export_prints_and_logs_nothing(tmp_path, exported, capfd, caplog):
    classifier, images, _ = exported
    with caplog.at_level(logging.INFO):
        export_classifier(classifier, images[:2], tmp_path / "model.onnx", GEOMETRY)
        ExportedModel(tmp_path / "model.onnx").run(images.numpy())
    assert caplog.messages == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_one_module_imports_the_exporters_and_two_stages_that_module(package):
    graph = grimp.build_graph("loupe", include_external_packages=True)
    assert graph.find_modules_that_directly_import(package) == {"loupe.models.export"}
    stages = {"loupe.stages.export_classifier", "loupe.stages.export_detector"}
    assert graph.find_downstream_modules("loupe.models.export") == stages
