import pytest
import torch

from loupe.errors import DataError
from loupe.models.classifiers import get_data_config
from loupe.models.detectors.base import detect, fit_detector, save_detector
from loupe.models.detectors.family import build_detector, load_detector
from loupe.models.detectors.features import FeatureConfig

SIZE = (64, 96)


def draw_gradients(num_images, seed=0):
    """Brighter to the right, with noise."""
    generator = torch.Generator().manual_seed(seed)
    noise = 8 * torch.randn(num_images, *SIZE, generator=generator)
    return (torch.linspace(40, 200, SIZE[1]) + noise).clamp(0, 255).to(torch.uint8)[:, None]


def spoil(images):
    """A dark square, 16 pixels wide, its corner at (24, 56)."""
    spoiled = images.clone()
    spoiled[:, :, 24:40, 56:72] = 20
    return spoiled


def fit(seed=0):
    data = get_data_config("tf_efficientnet_lite0")
    config = FeatureConfig("tf_efficientnet_lite0", SIZE, SIZE, data.mean, data.std)
    detector = build_detector("padim", config, "package")
    fit_detector(detector, draw_gradients(24).split(8), seed)
    return detector


@pytest.fixture(scope="module")
def fitted():
    return fit()


def test_a_defect_scores_above_all_normal_images_and_is_found_where_it_is(fitted):
    normal = draw_gradients(8, seed=1)
    normal_scores, _ = detect(fitted, normal)
    scores, maps = detect(fitted, spoil(normal), batch_size=3)
    assert maps.shape == (8, *SIZE)
    assert scores.min() > normal_scores.max()
    places = maps.flatten(1).argmax(dim=1)
    rows, columns = places // SIZE[1], places % SIZE[1]
    assert ((rows >= 20) & (rows < 44)).all()
    assert ((columns >= 52) & (columns < 76)).all()


def test_a_saved_detector_gives_the_same_scores_and_maps(fitted, tmp_path):
    save_detector(fitted, {}, tmp_path)
    images = draw_gradients(3, seed=1)
    torch.testing.assert_close(detect(load_detector(tmp_path), images), detect(fitted, images))


def test_the_same_seed_gives_the_same_scores_and_another_seed_others(fitted):
    images = draw_gradients(3, seed=1)
    torch.testing.assert_close(detect(fit(seed=0), images), detect(fitted, images))
    assert not torch.allclose(detect(fit(seed=1), images)[0], detect(fitted, images)[0])


def test_too_few_normal_images_are_refused_with_how_many_are_needed(fitted):
    with pytest.raises(DataError, match="needs at least 10 normal images to be fitted, got 1"):
        fit_detector(fitted, [draw_gradients(1)], seed=0)


def test_features_far_from_zero_that_hardly_vary_keep_their_covariance(fitted):
    """As a camera that does not move gives them."""
    generator = torch.Generator().manual_seed(0)
    shapes = fitted.extractor.shapes
    batches = [[300 + 0.1 * torch.randn(50, *shape, generator=generator) for shape in shapes] for _ in range(6)]
    detector = fit()
    detector.fit_features(batches, torch.Generator().manual_seed(0), most_bytes=0)
    place = torch.cat([detector._select(batch) for batch in batches])[:, 17].double()
    whitening = detector.whitening[17].double()
    found = torch.linalg.inv(whitening.T @ whitening)
    expected = place.T.cov() + 0.01 * torch.eye(place.shape[1], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-4)
