import logging

import pytest
import torch

from loupe.errors import DataError
from loupe.models.classifiers import get_data_config
from loupe.models.detectors.base import FeatureDetector, detect, fit_detector
from loupe.models.detectors.family import build_detector
from loupe.models.detectors.features import FeatureConfig
from loupe.models.detectors.padim import Padim

SIZE = (64, 64)
NUM_PASSES = 3


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


class SlowPadim(Padim):
    """One that looks at the first batch, and goes through the features three times."""

    def fit_features(self, batches, generator):
        next(iter(batches()))
        counts = [sum(len(features[0]) for features in batches()) for _ in range(NUM_PASSES - 1)]
        assert counts == [36, 36]
        super().fit_features(batches, generator)


@pytest.fixture
def build():
    data = get_data_config("tf_efficientnet_lite0")
    config = FeatureConfig("tf_efficientnet_lite0", SIZE, SIZE, data.mean, data.std)
    return lambda: SlowPadim.build(config, "package").eval()


def count_bytes(detector, num_images):
    return 4 * num_images * sum(channels * rows * columns for channels, rows, columns in detector.extractor.shapes)


def fit(detector, most_bytes):
    """How many images' features were computed, and what the log says."""
    computed = []
    detector.extractor.register_forward_hook(lambda module, inputs, outputs: computed.append(len(inputs[0])))
    fit_detector(detector, Batches(draw(36)), seed=0, most_bytes=most_bytes)
    return sum(computed)


@pytest.mark.parametrize(("num_kept", "room"), [(0, 3.9), (16, 17.9), (20, 20), (36, 36)])
def test_features_beyond_the_bound_are_computed_at_each_pass_and_the_result_is_the_same(build, caplog, num_kept, room):
    caplog.set_level(logging.INFO, "loupe.models.detectors.base")
    bounded, unbounded = build(), build()
    num_computed = fit(bounded, int(count_bytes(bounded, room)))
    assert caplog.messages == [
        f"features of {num_kept} of 36 images are kept in memory; each pass computes the rest",
    ]
    assert num_kept <= room
    looked_at_twice = 8 if num_kept == 0 else 0
    assert num_computed == 36 + looked_at_twice + (NUM_PASSES - 1) * (36 - num_kept)
    fit(unbounded, 1 << 30)
    images = draw(4, seed=1)
    torch.testing.assert_close(detect(bounded, images), detect(unbounded, images))


def test_images_are_read_no_more_once_all_features_are_kept(build):
    detector, batches = build(), Batches(draw(36))
    fit_detector(detector, batches, seed=0)
    assert batches.read == 2 + 1 + 5  # so many as hold enough images, the first, and one pass


def test_too_few_images_are_counted_to_the_last_batch(build):
    with pytest.raises(DataError, match="needs at least 10 normal images to be fitted, got 9"):
        fit_detector(build(), Batches(draw(9)), seed=0)


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
