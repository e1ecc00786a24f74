import numpy as np
import pytest
import torch
from torch.nn import functional as F

from loupe.data.loading import PreparedDataset
from loupe.models.classifiers import get_data_config
from loupe.models.detectors.base import detect, save_detector
from loupe.models.detectors.family import build_detector, load_detector
from loupe.models.detectors.features import FeatureConfig
from loupe.training.detector import Reconstruction, train_detector
from loupe.training.trainer import Schedule

# The backbone is frozen, as it should be.
pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
SIZE = (64, 96)


def config_of(backbone="tf_efficientnet_lite0", size=SIZE, crop=SIZE):
    data = get_data_config(backbone)
    return FeatureConfig(backbone, crop, size, data.mean, data.std)


def draw_stripes(num_images, seed=0):
    """Grey diagonal stripes with noise, of any phase."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(SIZE[0]), torch.arange(SIZE[1]), indexing="ij")
    phase = 6.3 * torch.rand(num_images, 1, 1, generator=generator)
    noise = 8 * torch.randn(num_images, *SIZE, generator=generator)
    return (120 + 50 * torch.sin((rows + columns) / 3 + phase) + noise).clamp(0, 255).to(torch.uint8)[:, None]


def spoil(images):
    """A flat square, 16 pixels wide, its corner at (24, 56)."""
    spoiled = images.clone()
    spoiled[:, :, 24:40, 56:72] = 120
    return spoiled


def list_frozen(detector):
    """Everything of the teacher: weights, and the statistics of its normalisation."""
    return {key: value.clone() for key, value in detector.extractor.state_dict().items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.manual_seed(0)
    detector = build_detector("deep_feature_autoencoder", config_of(), "package")
    before = list_frozen(detector)
    images = draw_stripes(32).permute(0, 2, 3, 1).numpy()
    dataset = PreparedDataset(images, np.arange(32), np.zeros(32, np.int64), None, seed=0)
    recipe = Reconstruction(Schedule(20, 20, "32-true"), 8, 0.01)
    history = train_detector(detector, dataset, dataset, recipe, tmp_path_factory.mktemp("model"), lambda *_: None)
    return detector.eval(), before, history


def test_a_defect_scores_above_all_normal_images_and_is_found_where_it_is(trained):
    detector, _, history = trained
    losses = history.to_table()["val/loss"]
    assert losses.iloc[-1] < losses.iloc[0] / 2
    normal = draw_stripes(12, seed=1)
    scores, maps = detect(detector, spoil(normal))
    assert maps.shape == (12, *SIZE)
    assert scores.min() > detect(detector, normal)[0].max()
    rows, columns = np.unravel_index(maps.flatten(1).argmax(dim=1).numpy(), SIZE)
    assert ((rows >= 16) & (rows < 48)).all()
    assert ((columns >= 48) & (columns < 80)).all()


def test_training_changes_nothing_of_the_backbone(trained):
    detector, before, _ = trained
    for key, value in list_frozen(detector).items():
        assert torch.equal(value, before[key]), key
    trainable = {name.split(".")[0] for name, weight in detector.named_parameters() if weight.requires_grad}
    assert trainable == {"bottleneck", "decoder"}
    detector.train()
    assert detector.bottleneck.training
    assert not any(module.training for module in detector.extractor.modules())
    detector.eval()


def test_the_loss_is_one_minus_the_mean_cosine_of_each_place_mean_over_the_levels(trained):
    detector, images = trained[0], draw_stripes(3, seed=2)
    levels = detector.extractor(images)
    values, means = detector.bottleneck(levels), []
    for step, level in zip(detector.decoder, reversed(levels), strict=True):
        values, rebuilt = step(values)
        assert rebuilt.shape == level.shape
        cosines = [
            torch.dot(level[n, :, y, x], rebuilt[n, :, y, x]) / level[n, :, y, x].norm() / rebuilt[n, :, y, x].norm()
            for n in range(3)
            for y in range(level.shape[2])
            for x in range(level.shape[3])
        ]
        means.append(1 - torch.stack(cosines).mean())
    torch.testing.assert_close(detector.compute_losses(images, 0.5)["loss"], torch.stack(means).mean())


def test_the_score_is_the_mean_of_the_largest_hundredth_of_the_blurred_sum_of_distances(trained):
    detector, images = trained[0], draw_stripes(2, seed=2)
    with torch.inference_mode():
        distances = detector.compute_distances(images)
    scores, _ = detect(detector, images)
    total = sum(F.interpolate(level[:, None], distances[0].shape[1:], mode="bilinear") for level in distances)
    weights = torch.exp(-0.5 * torch.arange(-2.0, 3.0).square())
    kernel = torch.outer(weights, weights) / weights.sum() ** 2
    blurred = F.conv2d(F.pad(total, (2, 2, 2, 2), mode="reflect"), kernel[None, None])
    largest = blurred.flatten(1).sort(descending=True).values[:, :4]  # of 16 x 24 places
    torch.testing.assert_close(scores, largest.mean(dim=1))


def test_an_image_is_embedded_as_one_vector_that_does_not_depend_on_the_batch(trained):
    detector, images = trained[0], draw_stripes(5, seed=2)
    with torch.inference_mode():
        whole, single = detector.embed(images), torch.cat([detector.embed(image[None]) for image in images])
    assert whole.ndim == 2
    torch.testing.assert_close(whole, single, rtol=1e-3, atol=1e-4)


def test_a_saved_detector_gives_the_same_scores_and_maps(trained, tmp_path):
    save_detector(trained[0], {}, tmp_path)
    loaded, images = load_detector(tmp_path), draw_stripes(3, seed=1)
    assert loaded.config == trained[0].config
    torch.testing.assert_close(detect(loaded, images), detect(trained[0], images))


@pytest.mark.parametrize("backbone", ["resnet18", "vit_tiny_patch16_224"])
def test_any_backbone_with_features_at_several_levels_will_do(backbone):
    size = (64, 96) if backbone != "vit_tiny_patch16_224" else (96, 96)
    detector = build_detector("deep_feature_autoencoder", config_of(backbone, size), "none")
    images = draw_stripes(4)
    detector.train().compute_losses(images, 0.0)["loss"].backward()
    assert all(weight.grad.isfinite().all() for weight in detector.parameters() if weight.requires_grad)
    scores, maps = detect(detector.eval(), images)
    assert scores.shape == (4,)
    assert maps.shape == (4, *SIZE)


def test_the_exported_graph_gives_the_same_scores_and_maps_for_any_batch(trained, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.onnx.export(
        trained[0], (draw_stripes(2),), dynamo=True, verbose=False, dynamic_shapes={"images": {0: batch}}
    )
    program.save(str(tmp_path / "model.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    images = draw_stripes(3, seed=1)
    found = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    for values, expected in zip(found, detect(trained[0], images), strict=True):
        np.testing.assert_allclose(values, expected.numpy(), rtol=1e-3, atol=1e-3)
