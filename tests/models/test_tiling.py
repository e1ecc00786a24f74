import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loupe.errors import ConfigError, DataError
from loupe.models.classifiers import get_data_config
from loupe.models.detectors.autoencoder import Autoencoder, AutoencoderConfig
from loupe.models.detectors.base import Detector, TrainedDetector, check_num_images, detect, fit_detector, save_detector
from loupe.models.detectors.family import build_detector, load_detector
from loupe.models.detectors.features import FeatureConfig
from loupe.models.detectors.tiling import TILES_AT_ONCE, TiledDetector, TiledImages, choose_tiles


@dataclass(frozen=True)
class Crop:
    crop: tuple[int, int]


class Brightness(Detector):
    """The map is the image's first channel, the score its largest value."""

    name = "brightness"
    config_type = Crop

    def __init__(self, crop):
        super().__init__()
        self.config = Crop(crop)
        self.register_buffer("zero", torch.zeros(()))

    @classmethod
    def build(cls, config, weights):
        return cls(config.crop)

    def forward(self, images):
        assert images.shape[2:] == self.config.crop
        assert torch.compiler.is_exporting() or len(images) <= TILES_AT_ONCE
        maps = images[:, 0].float()
        return maps.amax(dim=(1, 2)), maps

    def embed(self, images):
        return images.float().mean(dim=(2, 3))


class Places(TrainedDetector, Brightness):
    """The loss is the mean value of what it is given."""

    def compute_losses(self, images, progress):
        return {"loss": images.float().mean()}


def tile(canvas, tiles, overlap=0.25, kind=Brightness):
    crop, rows, columns = choose_tiles(canvas, tiles, overlap)
    return TiledDetector(kind(crop), rows, columns).eval()


canvases = st.tuples(st.integers(16, 90), st.integers(16, 90))
overlaps = st.floats(0, 0.6)


@settings(max_examples=60, deadline=None)
@given(canvases, st.integers(1, 5), overlaps)
def test_every_pixel_is_covered_and_neighbours_overlap_as_much_as_was_asked_for(canvas, tiles, overlap):
    (height, width), rows, columns = choose_tiles(canvas, tiles, overlap)
    detector = TiledDetector(Brightness((height, width)), rows, columns)
    where = torch.stack(torch.meshgrid(*map(torch.arange, canvas), indexing="ij")).to(torch.uint8)
    pieces = detector.cut(where[None])
    assert pieces.shape == (rows * columns, 2, height, width)
    assert len(pieces.transpose(0, 1).flatten(1).unique(dim=1).T) == canvas[0] * canvas[1]
    for axis, (side, length, count) in enumerate(zip(canvas, (height, width), (rows, columns), strict=True)):
        starts = pieces[:, axis, 0, 0].int().unique()
        assert len(starts) == count
        assert starts[0] == 0
        assert starts[-1] == side - length
        assert all(length - step >= math.floor(overlap * length) for step in starts.diff())


@settings(max_examples=40, deadline=None)
@given(canvases, st.integers(1, 4), overlaps, st.integers(0, 2**32 - 1))
def test_a_pixels_value_comes_back_where_it_was_and_a_constant_stays_one(canvas, tiles, overlap, seed):
    drawn = np.random.default_rng(seed).integers(0, 256, (3, 1, *canvas), dtype=np.uint8)
    drawn[2] = 77
    images = torch.from_numpy(drawn)
    scores, maps = tile(canvas, tiles, overlap)(images)
    torch.testing.assert_close(maps, images[:, 0].float())
    torch.testing.assert_close(scores, images.flatten(1).amax(dim=1).float())


def test_where_tiles_disagree_the_one_that_sees_more_around_a_pixel_weighs_more():
    detector = TiledDetector(Brightness((4, 6)), 1, 2)
    maps = torch.stack([torch.zeros(4, 6), torch.ones(4, 6)])
    stitched = detector.stitch(maps, 4, 8)
    # in columns 2 to 5 the tiles' distances to their rims are 3 and 1, 3 and 2, 2 and 3, 1 and 3
    expected = torch.tensor([0, 0, 1 / 4, 2 / 5, 3 / 5, 3 / 4, 1, 1])
    torch.testing.assert_close(stitched[0], expected.expand(4, 8))


@pytest.mark.parametrize(
    ("canvas", "tiles", "expected"),
    [
        ((100, 100), 1, ((100, 100), 1, 1)),
        ((175, 175), 2, ((100, 100), 2, 2)),
        ((100, 250), 1, ((100, 100), 1, 3)),
        ((250, 100), 1, ((100, 100), 3, 1)),
        ((100, 130), 1, ((100, 130), 1, 1)),
    ],
)
def test_tiles_are_counted_along_the_shorter_side_and_nearly_square(canvas, tiles, expected):
    assert choose_tiles(canvas, tiles, 0.25) == expected


@pytest.mark.parametrize("size", [(20, 60), (60, 20), (40, 100)])
def test_images_that_the_tiles_do_not_cover_are_refused(size):
    with pytest.raises(
        ConfigError, match=rf"2 x 2 tiles of 24 x 32 pixels don't cover images of {size[0]} x {size[1]}"
    ):
        TiledDetector(Brightness((24, 32)), 2, 2)(torch.zeros(1, 1, *size, dtype=torch.uint8))


def test_an_image_is_embedded_as_the_mean_of_its_tiles():
    detector = TiledDetector(Brightness((2, 2)), 1, 2)
    images = torch.tensor([[[[1, 1, 3, 3], [1, 1, 3, 3]]], [[[0, 0, 9, 9], [0, 0, 9, 9]]]], dtype=torch.uint8)
    assert detector.embed(images).tolist() == [[2.0], [4.5]]


def test_training_draws_one_tile_of_each_image_and_validation_takes_the_same_ones_each_time():
    detector = TiledDetector(Places((2, 2)), 1, 2)
    images = torch.tensor([[[[0, 0, 100, 100], [0, 0, 100, 100]]]] * 2, dtype=torch.uint8)
    torch.manual_seed(0)
    drawn = {detector.train().compute_losses(images, 0.0)["loss"].item() for _ in range(40)}
    assert drawn == {0.0, 50.0, 100.0}
    assert {detector.eval().compute_losses(images, 0.0)["loss"].item() for _ in range(10)} == {50.0}


def test_a_fit_sees_all_tiles_of_all_images_each_time():
    detector = TiledDetector(Brightness((2, 2)), 1, 2)
    batches = [torch.arange(16, dtype=torch.uint8).reshape(2, 1, 2, 4), torch.zeros(40, 1, 2, 4, dtype=torch.uint8)]
    tiled = TiledImages(detector, batches)
    for _ in range(2):
        parts = list(tiled)
        assert max(map(len, parts)) <= TILES_AT_ONCE
        assert torch.cat(parts).shape == (84, 1, 2, 2)
        assert parts[0][:, 0, 0, 0].tolist() == [0, 8, 2, 10]


CANVAS = (112, 112)


def draw_gradients(num_images, seed=0):
    """Brighter to the right, with noise."""
    noise = 8 * torch.randn(num_images, *CANVAS, generator=torch.Generator().manual_seed(seed))
    return (torch.linspace(40, 200, CANVAS[1]) + noise).clamp(0, 255).to(torch.uint8)[:, None]


@pytest.fixture(scope="module")
def fitted():
    data = get_data_config("tf_efficientnet_lite0")
    crop, rows, columns = choose_tiles(CANVAS, 2, 0.25)
    config = FeatureConfig("tf_efficientnet_lite0", crop, crop, data.mean, data.std)
    detector = TiledDetector(build_detector("knn_patches", config, "package"), rows, columns)
    fit_detector(detector.inner, TiledImages(detector, draw_gradients(12).split(8)), seed=0)
    return detector.eval()


def test_a_defect_in_one_tile_scores_above_all_normal_images_and_is_found_where_it_is(fitted):
    normal = draw_gradients(6, seed=1)
    spoiled = normal.clone()
    spoiled[:, :, 80:96, 16:32] = 250
    scores, maps = detect(fitted, spoiled, batch_size=4)
    assert scores.min() > detect(fitted, normal)[0].max()
    places = maps.flatten(1).argmax(dim=1)
    rows, columns = places // CANVAS[1], places % CANVAS[1]
    assert ((rows >= 78) & (rows < 100)).all()
    assert ((columns >= 14) & (columns < 36)).all()


def test_a_saved_detector_gives_the_same_scores_and_maps(fitted, tmp_path):
    save_detector(fitted, {"threshold": 0.25}, tmp_path)
    loaded = load_detector(tmp_path)
    assert loaded.config == fitted.config
    images = draw_gradients(3, seed=1)
    torch.testing.assert_close(detect(loaded, images), detect(fitted, images))


def test_a_tiled_autoencoder_is_saved_with_the_config_of_its_own_kind(tmp_path):
    config = AutoencoderConfig(channels=1, width=4, latent_channels=2, crop=(64, 64), size=(32, 32))
    detector = TiledDetector(Autoencoder(config), 2, 2).eval()
    save_detector(detector, {}, tmp_path)
    assert load_detector(tmp_path).config == detector.config
    images = draw_gradients(2)
    torch.testing.assert_close(detect(load_detector(tmp_path), images), detect(detector, images))


def test_the_exported_graph_gives_the_same_scores_and_maps_for_any_batch(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    config = AutoencoderConfig(channels=1, width=4, latent_channels=2, crop=(64, 64), size=(32, 32))
    detector = TiledDetector(Autoencoder(config), 2, 2).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.onnx.export(
        detector, (draw_gradients(2),), dynamo=True, verbose=False, dynamic_shapes={"images": {0: batch}}
    )
    program.save(str(tmp_path / "model.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    images = draw_gradients(11, seed=1)  # more tiles than one chunk has
    found = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    for values, expected in zip(found, detect(detector, images), strict=True):
        np.testing.assert_allclose(values, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_tiles_take_as_many_images_as_the_detector_of_one():
    inner = Brightness((64, 64))
    inner.least_images = 10
    with pytest.raises(DataError, match="at least 10 normal images to be fitted, got 9"):
        check_num_images(TiledDetector(inner, 2, 2), 9)
