import pytest
import torch

from loupe.errors import DataError
from loupe.models.classifiers import get_data_config
from loupe.models.detectors.base import FeatureDetector, detect, fit_detector
from loupe.models.detectors.family import build_detector
from loupe.models.detectors.features import FeatureConfig
from loupe.models.detectors.padim import Padim

SIZE = (64, 64)


def draw(num_images, seed=0):
    return torch.randint(0, 256, (num_images, 1, *SIZE), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


class Batches:
    """Batches of 8, the last of which is smaller; `read` counts those that were read."""

    def __init__(self, images):
        self.images = images
        self.read = 0

    def __iter__(self):
        for batch in self.images.split(8):
            self.read += 1
            yield batch


@pytest.fixture
def padim():
    data = get_data_config("tf_efficientnet_lite0")
    return Padim.build(FeatureConfig("tf_efficientnet_lite0", SIZE, SIZE, data.mean, data.std), "package").eval()


def test_the_features_of_an_image_are_computed_once(padim):
    computed = []
    padim.extractor.register_forward_hook(lambda module, inputs, outputs: computed.append(len(inputs[0])))
    batches = Batches(draw(36))
    fit_detector(padim, batches, seed=0)
    assert computed == [8, 8, 8, 8, 4]
    assert batches.read == 2 + 5  # so many as hold enough images, and one pass


def test_too_few_images_are_counted_to_the_last_batch(padim):
    with pytest.raises(DataError, match="needs at least 10 normal images to be fitted, got 9"):
        fit_detector(padim, Batches(draw(9)), seed=0)


@pytest.mark.parametrize("name", ["feature_autoencoder", "padim", "knn_patches", "deep_feature_autoencoder"])
@pytest.mark.parametrize("size", [(32, 32), (64, 48)])
def test_maps_smaller_than_what_blurs_them_are_maps_all_the_same(name, size):
    config = FeatureConfig("vit_tiny_patch16_224", size, size, (0.5,), (0.5,))  # 2 x 2 places, and 4 x 3
    detector = build_detector(name, config, "none").eval()
    images = torch.randint(0, 256, (12, 1, *size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    if isinstance(detector, FeatureDetector):
        fit_detector(detector, images.split(4), seed=0)
    scores, maps = detect(detector, images)
    assert maps.shape == (12, *size)
    assert scores.isfinite().all()
    assert maps.isfinite().all()
