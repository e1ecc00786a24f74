import numpy as np
import pytest
import torch

from loupe.data.loading import EpochSampler, PreparedDataset, ResidentDataset, build_loader
from loupe.data.transforms import build_augmentation

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
MOVES = [{"name": "Affine", "rotate": (-40, 40), "translate_percent": (-0.2, 0.2), "p": 1.0}]


@pytest.fixture
def image(draw):
    """Too large to be augmented in whole batches on a CPU."""
    return np.asarray(draw(0, (64, 64)))


def dataset_of(images, augmentation=None, seed=0, rows=None):
    rows = np.arange(len(images)) if rows is None else rows
    return PreparedDataset(images, rows, np.arange(len(rows)) % 3, augmentation, seed)


def read(loader, epoch):
    loader.sampler.set_epoch(epoch)
    batches = list(loader)
    return torch.cat([images for images, _ in batches]), torch.cat([targets for _, targets in batches])


def augment_two_positions_for_two_epochs(image, num_workers, seed=0):
    """One image at two positions; with two workers and batches of one, each position has a worker of its own."""
    dataset = dataset_of(image[None], build_augmentation(MOVES), seed, rows=np.array([0, 0]))
    loader = build_loader(dataset, batch_size=1, shuffle=False, num_workers=num_workers)
    return torch.cat([read(loader, epoch)[0] for epoch in range(2)]).numpy()


def num_distinct(images):
    return len({image.tobytes() for image in images})


def test_two_workers_and_two_epochs_augment_one_image_in_four_ways(image):
    assert num_distinct(augment_two_positions_for_two_epochs(image, num_workers=2)) == 4


def test_a_rerun_augments_alike(image):
    first, again = (augment_two_positions_for_two_epochs(image, num_workers=2) for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_the_number_of_workers_does_not_count(image):
    alone, two = (augment_two_positions_for_two_epochs(image, num_workers) for num_workers in (0, 2))
    np.testing.assert_array_equal(alone, two)


def test_another_seed_augments_otherwise(image):
    first, other = (augment_two_positions_for_two_epochs(image, 0, seed) for seed in (0, 1))
    assert num_distinct([*first, *other]) == 8


def test_images_come_channels_first_with_their_targets(draw):
    images = np.stack([np.asarray(draw(seed)) for seed in range(5)])
    batch, targets = read(build_loader(dataset_of(images), batch_size=2, shuffle=False, num_workers=0), 0)
    np.testing.assert_array_equal(batch.permute(0, 2, 3, 1), images)
    assert batch.dtype == torch.uint8
    assert targets.tolist() == [0, 1, 2, 0, 1]


def test_rows_choose_among_all_images(draw):
    images = np.stack([np.asarray(draw(seed)) for seed in range(5)])
    dataset = dataset_of(images, rows=np.array([4, 1]))
    batch, _ = read(build_loader(dataset, batch_size=2, shuffle=False, num_workers=0), 0)
    np.testing.assert_array_equal(batch.permute(0, 2, 3, 1), images[[4, 1]])


def test_shuffled_images_keep_their_targets(draw):
    images = np.stack([np.full((4, 4, 1), number, np.uint8) for number in range(9)])
    batch, targets = read(build_loader(dataset_of(images), batch_size=9, shuffle=True, num_workers=0), 0)
    assert sorted(batch[:, 0, 0, 0].tolist()) == list(range(9))
    assert (batch[:, 0, 0, 0] % 3).tolist() == targets.tolist()


def test_a_draw_has_of_each_class_its_share_and_of_the_rarest_one():
    targets = np.repeat([0, 1, 2], [600, 398, 2])
    images = np.zeros((1000, 1, 1, 1), np.uint8)
    dataset = PreparedDataset(images, np.arange(1000), targets, build_augmentation(MOVES), seed=0)
    drawn = dataset.draw(100)
    assert list(np.bincount(drawn.targets)) == [60, 40, 1]
    assert list(targets[drawn.rows]) == drawn.targets.tolist()
    assert drawn.augmentation is None
    assert list(dataset.draw(1000).rows) == list(dataset.draw(2000).rows) == list(range(1000))


def positions(sampler, epoch):
    sampler.set_epoch(epoch)
    assert {of for of, _ in sampler} == {epoch}
    return [position for _, position in sampler]


def test_each_epoch_has_an_order_of_its_own_and_a_rerun_the_same():
    first, again = (EpochSampler(20, seed=0, shuffle=True) for _ in range(2))
    orders = [positions(first, epoch) for epoch in range(3)]
    assert [sorted(order) for order in orders] == [list(range(20))] * 3
    assert orders[0] != orders[1] != orders[2]
    assert [positions(again, epoch) for epoch in (2, 1, 0)] == orders[::-1]


def test_without_shuffling_the_order_is_kept():
    assert positions(EpochSampler(4, seed=0, shuffle=False), 3) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("num_images", "shuffle", "sizes"),
    [
        (8, True, [3, 3]),
        (8, False, [3, 3, 2]),
        (5, True, [3, 2]),
        (4, True, [3]),  # one alone has no batch statistics
        (4, False, [3, 1]),
        (1, True, [1]),
    ],
)
def test_a_last_small_batch_is_dropped_in_training_alone_and_only_where_others_stay(num_images, shuffle, sizes):
    images = np.zeros((num_images, 4, 4, 1), np.uint8)
    loader = build_loader(dataset_of(images), batch_size=3, shuffle=shuffle, num_workers=0)
    assert [len(targets) for _, targets in loader] == sizes


def test_images_are_read_from_a_memory_map(tmp_path, draw):
    np.save(tmp_path / "images.npy", np.stack([np.asarray(draw(seed)) for seed in range(4)]))
    images = np.load(tmp_path / "images.npy", mmap_mode="r")
    loader = build_loader(dataset_of(images, build_augmentation(MOVES)), batch_size=2, shuffle=False, num_workers=2)
    assert read(loader, 0)[0].shape == (4, 3, 20, 24)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_images_on_a_device_come_in_the_same_batches(device, draw):
    dataset = dataset_of(np.stack([np.asarray(draw(seed)) for seed in range(5)]), rows=np.array([4, 1, 3]))
    keys = [(0, 2), (0, 0)]
    resident = ResidentDataset(dataset, torch.device(device))
    for expected, found in zip(dataset.__getitems__(keys), resident.__getitems__(keys), strict=True):
        assert found.device.type == device
        assert torch.equal(expected, found.cpu())
    assert len(resident) == 3


@needs_gpu
def test_small_images_without_augmentation_lie_on_the_gpu(draw):
    images = np.stack([np.asarray(draw(seed)) for seed in range(5)])
    assert read(build_loader(dataset_of(images), 2, shuffle=False, num_workers=2), 0)[0].is_cuda
    augmented = dataset_of(images, build_augmentation(MOVES))
    assert not read(build_loader(augmented, 2, shuffle=False, num_workers=0), 0)[0].is_cuda
