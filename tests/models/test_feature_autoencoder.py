import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from sklearn.covariance import EmpiricalCovariance
from sklearn.decomposition import PCA
from torch.nn import functional as F

from loupe.errors import ConfigError, DataError
from loupe.models.classifiers import get_data_config
from loupe.models.detectors.base import detect, fit_detector, save_detector
from loupe.models.detectors.family import build_detector, load_detector
from loupe.models.detectors.feature_autoencoder import (
    COARSE_WEIGHT,
    LEAST_NOISE,
    MOST_CHANNELS,
    NOISE_IMAGES,
    NUM_COMPONENTS,
    TOP_PLACES,
    compute_components,
    compute_whitening,
)
from loupe.models.detectors.features import LEAST_PLACES, FeatureConfig
from loupe.models.files import load_config

SIZE = (64, 96)


def config_of(crop=SIZE, size=SIZE, backbone="tf_efficientnet_lite0"):
    data = get_data_config(backbone)
    return FeatureConfig(backbone, crop, size, data.mean, data.std)


def draw_stripes(num_images, seed=0, size=SIZE):
    """Grey diagonal stripes with noise, of any phase."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    phase = 6.3 * torch.rand(num_images, 1, 1, generator=generator)
    noise = 8 * torch.randn(num_images, *size, generator=generator)
    return (120 + 50 * torch.sin((rows + columns) / 3 + phase) + noise).clamp(0, 255).to(torch.uint8)[:, None]


def spoil(images):
    """A flat square, 16 pixels wide, its corner at (24, 56)."""
    spoiled = images.clone()
    spoiled[:, :, 24:40, 56:72] = 120
    return spoiled


@pytest.fixture(scope="module")
def fitted():
    detector = build_detector("feature_autoencoder", config_of(), "package")
    fit_detector(detector, draw_stripes(24).split(8), seed=0)
    return detector


def test_scores_and_maps_have_the_shape_of_the_images(fitted):
    scores, maps = detect(fitted, draw_stripes(5, seed=1), batch_size=2)
    assert scores.shape == (5,)
    assert maps.shape == (5, *SIZE)


def test_a_defect_scores_above_all_normal_images(fitted):
    normal = draw_stripes(12, seed=1)
    assert detect(fitted, spoil(normal))[0].min() > detect(fitted, normal)[0].max()


def test_a_defect_is_found_where_it_is():
    size = (128, 192)
    detector = build_detector("feature_autoencoder", config_of(size, size), "package")
    fit_detector(detector, draw_stripes(24, size=size).split(8), seed=0)
    _, maps = detect(detector, spoil(draw_stripes(12, seed=1, size=size)))
    rows, columns = np.unravel_index(maps.flatten(1).argmax(dim=1).numpy(), size)
    assert ((rows >= 20) & (rows < 44)).all()
    assert ((columns >= 52) & (columns < 76)).all()


def test_scores_do_not_depend_on_the_batch(fitted):
    images = draw_stripes(5, seed=1)
    whole, single = detect(fitted, images), detect(fitted, images, batch_size=1)
    torch.testing.assert_close(whole, single, rtol=1e-3, atol=1e-3)


def test_a_fit_does_not_depend_on_the_batches(fitted):
    other = build_detector("feature_autoencoder", config_of(), "package")
    fit_detector(other, draw_stripes(24).split(7), seed=1)
    images = draw_stripes(4, seed=1)
    torch.testing.assert_close(detect(other, images), detect(fitted, images), rtol=1e-2, atol=1e-2)


def test_a_saved_detector_gives_the_same_scores_and_maps(fitted, tmp_path):
    save_detector(fitted, {"threshold": 0.25}, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert load_config(tmp_path)["threshold"] == 0.25
    images = draw_stripes(3, seed=1)
    torch.testing.assert_close(detect(load_detector(tmp_path), images), detect(fitted, images))


def test_small_images_are_enlarged_for_the_backbone_and_maps_keep_their_size():
    detector = build_detector("feature_autoencoder", config_of(crop=(28, 28), size=(64, 64)), "package")
    images = draw_stripes(10, size=(28, 28))
    fit_detector(detector, [images], seed=0)
    assert detect(detector, images)[1].shape == (10, 28, 28)


def test_training_mode_does_not_change_the_frozen_backbone(fitted):
    images = draw_stripes(3, seed=1)
    before = detect(fitted, images)
    fitted.train()
    assert not fitted.extractor.backbone.training
    torch.testing.assert_close(detect(fitted, images), before)


def draw_features(num_images, strengths, seed=0):
    """Correlated vectors, (images, places, channels), as strong at each place as is told."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(4, 4, generator=generator)
    vectors = torch.randn(num_images, len(strengths), 4, generator=generator) @ mixing
    return vectors * torch.tensor(strengths).sqrt()[:, None]


def covariances_of(vectors):
    return torch.stack([torch.cov(place.T, correction=0) for place in vectors.unbind(dim=1)])


def compute_energies(vectors, covariances, noise, num_components=4):
    """Of (images, places, channels), as the detector weighs them."""
    whitening = compute_whitening(covariances.mean(dim=0))
    components, weight = compute_components(whitening @ covariances @ whitening.T, noise, num_components)
    whitened = vectors @ whitening.T
    forgiven = torch.einsum("pck,npc->npk", components, whitened).square().sum(dim=2)
    return weight * whitened.square().sum(dim=2) - forgiven


def test_with_hardly_any_noise_the_error_is_the_mahalanobis_distance_of_each_place():
    vectors = draw_features(50, (1.0, 4.0, 0.2))
    energies = compute_energies(vectors - vectors.mean(dim=0), covariances_of(vectors), noise=1e-4)
    for place in range(3):
        values = vectors[:, place].numpy()
        np.testing.assert_allclose(energies[:, place], EmpiricalCovariance().fit(values).mahalanobis(values), rtol=1e-2)


def test_the_error_is_the_energy_of_what_the_wiener_filter_leaves_measured_against_the_noise():
    vectors, strengths, noise = draw_features(50, (2.0, 4.0, 1e-6)).double(), [], 0.25
    covariances = covariances_of(vectors)
    usual = covariances.mean(dim=0)
    features = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    energies = compute_energies(features[None].float(), covariances.float(), noise)[0]
    for values, covariance, energy in zip(features, covariances, energies, strict=True):
        strengths.append((torch.linalg.inv(usual) @ covariance).trace() / 4)
        added = noise * max(strengths[-1], LEAST_NOISE) * usual
        rebuilt = covariance @ torch.linalg.inv(covariance + added) @ values
        expected = values @ torch.linalg.inv(added) @ (values - rebuilt)
        torch.testing.assert_close(energy.double(), expected, rtol=1e-2, atol=0)
    assert strengths[1] > strengths[0] > LEAST_NOISE > strengths[2]  # so that the third place has more than its own


def test_what_the_principal_components_leave_varies_alike_as_in_probabilistic_pca():
    noise = 0.25
    vectors = draw_features(50, (1.0, 3.0))
    vectors = vectors - vectors.mean(dim=0)
    covariances = covariances_of(vectors)
    whitening = compute_whitening(covariances.mean(dim=0))
    energies = compute_energies(vectors, covariances, noise, num_components=2)
    for place in range(2):
        values = (vectors[:, place] @ whitening.T).double().numpy()
        covariance = PCA(2).fit(values).get_covariance() * 49 / 50  # sklearn divides by one less
        covariance += noise * max(np.trace(covariance) / 4, LEAST_NOISE) * np.eye(4)
        expected = np.einsum("nc,cd,nd->n", values, np.linalg.inv(covariance), values)
        np.testing.assert_allclose(energies[:, place], expected, rtol=1e-3)


def test_each_view_has_a_filter_of_each_of_its_places(fitted):
    train, unseen = (fitted.extractor(images) for images in (draw_stripes(24), draw_stripes(2, seed=1)))
    for wiener, levels in zip(fitted.filters, (slice(0, 3), slice(3, 6)), strict=True):
        values, errors = wiener.select(train[levels]), wiener(unseen[levels]).flatten(1)
        covariances = covariances_of(values.transpose(0, 1))
        for place in (0, len(values) // 3, len(values) - 1):
            features = (wiener.select(unseen[levels])[place] - values[place].mean(dim=0))[:, None]
            expected = compute_energies(features, covariances, NOISE_IMAGES / 24, NUM_COMPONENTS)[:, place]
            torch.testing.assert_close(errors[:, place], expected, rtol=1e-2, atol=0)


def test_the_errors_of_both_views_add_up_the_score_is_the_mean_of_the_largest_and_the_map_their_blur(fitted):
    features = fitted.extractor(spoil(draw_stripes(2, seed=1)))
    views = features[:3], features[3:]
    fine, coarse = (wiener(view).flatten(1) for wiener, view in zip(fitted.filters, views, strict=True))
    enlarged = F.interpolate(coarse.view(2, 1, 4, 6), (8, 12), mode="bilinear").flatten(1)
    errors = (fine + COARSE_WEIGHT * enlarged).sqrt()
    scores, maps = fitted.score_features(features)
    torch.testing.assert_close(scores, errors.sort(dim=1).values[:, -TOP_PLACES:].mean(dim=1))
    assert maps.shape == (2, SIZE[0] // 8, SIZE[1] // 8)
    np.testing.assert_allclose(maps[0], gaussian_filter(errors[0].reshape(8, 12), 1, mode="mirror"), rtol=1e-2)


@pytest.mark.parametrize("size", [SIZE, (192, 224)])
def test_the_second_view_is_of_the_images_made_smaller(size):
    extractor = build_detector("feature_autoencoder", config_of(size, size), "package").extractor
    images = draw_stripes(2, seed=1, size=size)
    reduced = F.avg_pool2d(extractor.preprocess(images), extractor.reductions[1])
    levels = extractor.backbone.forward_intermediates(reduced, indices=extractor.levels, intermediates_only=True)
    views = extractor(images)
    assert [tuple(level.shape[1:]) for level in views] == extractor.shapes
    for level, seen in zip(levels, views[3:], strict=True):
        torch.testing.assert_close(seen, F.avg_pool2d(level, 3, stride=1, padding=1, count_include_pad=False))


@pytest.mark.parametrize(
    ("size", "reductions"), [((48, 160), [1]), ((64, 64), [1, 2]), ((128, 192), [1, 2]), ((192, 224), [1, 4])]
)
def test_the_second_view_is_as_small_as_leaves_its_coarsest_level_some_rows(size, reductions):
    detector = build_detector("feature_autoencoder", config_of(size=size), "package")
    assert detector.extractor.reductions == reductions
    assert len(detector.filters) == len(reductions)
    assert min(min(rows, columns) for _, rows, columns in detector.extractor.shapes) >= LEAST_PLACES


def test_a_backbone_that_takes_one_size_alone_has_one_view():
    detector = build_detector("feature_autoencoder", config_of(backbone="test_vit"), "none")
    assert len(detector.filters) == 1


def test_of_a_backbone_with_many_channels_some_are_drawn():
    def fit(seed):
        detector = build_detector("feature_autoencoder", config_of(backbone="test_vit"), "none")
        torch.manual_seed(0)
        fit_detector(detector, [draw_stripes(10)], seed=seed)
        return detector.filters[0].chosen.tolist()

    assert len(set(fit(0))) == MOST_CHANNELS
    assert fit(0) == fit(0) != fit(1)


def test_images_that_are_all_alike_leave_finite_scores():
    detector = build_detector("feature_autoencoder", config_of(), "package")
    images = draw_stripes(1).repeat(10, 1, 1, 1)
    fit_detector(detector, [images], seed=0)
    scores, maps = detect(detector, images)
    assert scores.isfinite().all()
    assert maps.isfinite().all()


def test_too_few_normal_images_are_refused_with_how_many_are_needed():
    detector = build_detector("feature_autoencoder", config_of(), "package")
    with pytest.raises(DataError, match="needs at least 10 normal images to be fitted, got 9"):
        fit_detector(detector, [draw_stripes(9)], seed=0)


def test_an_input_too_small_for_the_coarsest_level_is_refused():
    with pytest.raises(ConfigError, match="at least 32 x 32 pixels, got 16 x 48: choose a larger input size"):
        build_detector("feature_autoencoder", config_of(crop=(16, 48), size=(16, 48)), "package")


def test_an_unknown_detector_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"must be one of .*feature_autoencoder.*; got 'padime'"):
        build_detector("padime", config_of(), "package")


def test_the_exported_graph_gives_the_same_scores_and_maps_for_any_batch(fitted, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.onnx.export(
        fitted.eval(), (draw_stripes(2),), dynamo=True, verbose=False, dynamic_shapes={"images": {0: batch}}
    )
    program.save(str(tmp_path / "model.onnx"))
    images = draw_stripes(3, seed=1)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    scores, maps = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    expected_scores, expected_maps = detect(fitted, images)
    np.testing.assert_allclose(scores, expected_scores.numpy(), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(maps, expected_maps.numpy(), rtol=1e-2, atol=1e-2)
