import pytest
import torch

from loupe.errors import DataError
from loupe.models.classifiers import get_data_config
from loupe.models.detectors.base import detect, fit_detector, save_detector
from loupe.models.detectors.family import build_detector, load_detector
from loupe.models.detectors.features import FeatureConfig
from loupe.models.detectors.knn_patches import BANK_SIZE, choose_far_apart, draw_patches, find_nearest

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


def fit(seed=0, num_images=24):
    data = get_data_config("tf_efficientnet_lite0")
    config = FeatureConfig("tf_efficientnet_lite0", SIZE, SIZE, data.mean, data.std)
    detector = build_detector("knn_patches", config, "package")
    fit_detector(detector, draw_gradients(num_images).split(8), seed)
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


def test_the_same_seed_draws_the_same_patches_and_another_seed_others():
    fitted, images = fit(seed=0, num_images=72), draw_gradients(3, seed=1)
    torch.testing.assert_close(detect(fit(seed=0, num_images=72), images), detect(fitted, images))
    assert not torch.allclose(detect(fit(seed=1, num_images=72), images)[1], detect(fitted, images)[1])


def test_a_bank_larger_than_all_patches_does_not_depend_on_the_seed(fitted):
    images = draw_gradients(3, seed=1)
    torch.testing.assert_close(detect(fit(seed=1), images), detect(fitted, images))


def draw_numbered(num_batches, room, seed=0):
    """From patches that are numbered through: 3 images of 4 x 5 places a batch."""
    finest, coarsest = torch.zeros(3, 1, 8, 10), torch.zeros(3, 1, 2, 3)
    numbers = torch.arange(num_batches * 60.0).reshape(num_batches, 3, 1, 4, 5)
    batches = [[finest, one, coarsest] for one in numbers]
    drawn = draw_patches(batches, torch.full((room, 2), torch.nan), torch.Generator().manual_seed(seed))
    return drawn[:, 0].tolist()


def test_more_patches_than_may_be_kept_are_drawn_from_and_the_log_says_so(caplog):
    caplog.set_level("INFO", "loupe.models.detectors.knn_patches")
    detector, images = fit(), draw_gradients(48)  # of 8 x 12 places each
    fit_detector(detector, images.split(8), seed=0, most_bytes=4 * detector.bank.shape[1] * 4200)
    assert caplog.messages == ["4200 of 4608 patches are drawn, as no more are to be kept in memory"]
    assert BANK_SIZE < 4200


@pytest.mark.parametrize("size", [1, 512, 1300])
def test_the_nearest_of_a_bank_is_that_of_the_least_distance(size):
    generator = torch.Generator().manual_seed(size)
    patches, bank = torch.randn(3, 40, 7, generator=generator), torch.randn(size, 7, generator=generator)
    assert torch.equal(find_nearest(patches, bank), torch.cdist(patches, bank).argmin(dim=2))


@pytest.mark.parametrize("room", [120, 500])
def test_all_patches_are_candidates_where_there_is_room(room):
    assert sorted(draw_numbered(2, room)) == list(range(120))


def test_where_there_is_no_room_for_all_each_patch_is_as_likely_a_candidate():
    drawn = [draw_numbered(5, 50, seed) for seed in range(200)]
    assert all(len(set(one)) == 50 for one in drawn)
    batches = torch.tensor(drawn).long().div(60, rounding_mode="floor").flatten().bincount(minlength=5)
    assert batches.sum() == 10_000
    assert ((batches - 2_000).abs() < 5 * 40).all()  # five standard deviations of a binomial


def test_points_far_from_the_many_are_chosen_first():
    many = torch.rand(500, 3, generator=torch.Generator().manual_seed(0))
    few = torch.tensor([[9.0, 0, 0], [0, -7, 0], [0, 0, 5]])
    points = torch.cat([many, few])
    chosen = points[choose_far_apart(points, 4)]
    assert sorted(map(tuple, chosen.tolist())) == sorted([tuple(many[0].tolist()), *map(tuple, few.tolist())])


def test_one_of_each_of_five_tight_clusters_is_chosen():
    generator = torch.Generator().manual_seed(0)
    points = 10 * torch.eye(5).repeat(40, 1) + torch.randn(200, 5, generator=generator)
    chosen = points[choose_far_apart(points, 5)]
    assert sorted(chosen.argmax(dim=1).tolist()) == [0, 1, 2, 3, 4]


def test_fewer_points_than_are_asked_for_are_all_chosen_and_repeated():
    points = torch.rand(7, 2, generator=torch.Generator().manual_seed(0))
    chosen = points[choose_far_apart(points, 20)]
    assert chosen.shape == (20, 2)
    assert {tuple(one) for one in chosen.tolist()} == {tuple(one) for one in points.tolist()}


def test_too_few_normal_images_are_refused_with_how_many_are_needed(fitted):
    with pytest.raises(DataError, match="needs at least 2 normal images to be fitted, got 1"):
        fit_detector(fitted, [draw_gradients(1)], seed=0)
