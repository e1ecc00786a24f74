import albumentations as A
import numpy as np
import pytest
import torch

from loupe.data.batched import BatchedAugmentation, Flip, Move
from loupe.data.loading import PreparedDataset, ResidentDataset
from loupe.data.transforms import POLICIES, build_augmentation, list_batched_steps

STILL = (1.0, 1.0)
NO_SHIFT = (0.0, 0.0)


@pytest.fixture
def image(draw):
    """Smooth, and neither square nor symmetric."""
    return np.asarray(draw(3, (48, 36)))


def to_batch(image, num_images=1):
    return torch.from_numpy(np.stack([image] * num_images)).permute(0, 3, 1, 2)


def augment(steps, batch, epoch=0, positions=None, num_images=None, seed=0):
    positions = torch.arange(len(batch)) if positions is None else torch.tensor(positions)
    return BatchedAugmentation(steps, num_images or len(batch), seed, batch.device)(batch, epoch, positions)


@pytest.mark.parametrize(
    "arguments",
    [
        {"rotate": (25, 25)},
        {"scale": {"x": (1.3, 1.3), "y": (0.8, 0.8)}},
        {"translate_percent": {"x": (0.25, 0.25), "y": (-0.25, -0.25)}},
        {
            "rotate": (-15, -15),
            "scale": {"x": (0.9, 0.9), "y": (1.2, 1.2)},
            "translate_percent": {"x": (0.25, 0.25), "y": (0.25, 0.25)},
        },
    ],
)
def test_a_move_is_the_one_that_albumentations_makes(image, arguments):
    transform = A.Affine(**{"scale": STILL, **arguments}, p=1.0)
    expected = transform(image=image)["image"].astype(float)
    steps = list_batched_steps(A.Compose([transform]))
    moved = augment(steps, to_batch(image))[0].permute(1, 2, 0).numpy().astype(float)
    inner = np.s_[2:-2, 2:-2]  # the two round differently where the image ends
    assert np.abs(moved - expected)[inner].mean() < 2
    assert np.abs(image.astype(float) - expected)[inner].mean() > 10


@pytest.mark.parametrize(("transform", "axis"), [(A.HorizontalFlip(p=1.0), 1), (A.VerticalFlip(p=1.0), 0)])
def test_a_flip_is_the_one_that_albumentations_makes(image, transform, axis):
    flipped = augment(list_batched_steps(A.Compose([transform])), to_batch(image))[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(flipped, np.flip(image, axis))


def test_what_is_drawn_follows_from_seed_epoch_and_position_alone(image):
    steps = list_batched_steps(build_augmentation(POLICIES["light"]))
    whole = augment(steps, to_batch(image, 8))
    parts = [augment(steps, to_batch(image, 4), positions=part, num_images=8) for part in ([6, 4, 2, 0], [7, 5, 3, 1])]
    assert torch.equal(whole[[6, 4, 2, 0]], parts[0])
    assert torch.equal(whole[[7, 5, 3, 1]], parts[1])
    assert len({one.numpy().tobytes() for one in whole}) == 8
    assert not torch.equal(whole, augment(steps, to_batch(image, 8), epoch=1))
    assert not torch.equal(whole, augment(steps, to_batch(image, 8), seed=1))


def test_a_part_of_the_images_is_left_as_it_is(image):
    batch = to_batch(image, 400)
    steps = [Flip(0.25, 3), Move(0.0, STILL, STILL, (0.5, 0.5), NO_SHIFT, NO_SHIFT)]
    flipped = (augment(steps, batch) != batch).flatten(1).any(dim=1)
    assert 0.17 < flipped.float().mean() < 0.33


def test_photos_are_augmented_one_at_a_time():
    for specs in (
        [{"name": "ColorJitter"}],
        [{"name": "Affine", "shear": (-5, 5)}],
        [{"name": "Affine", "border_mode": 4}],
        [{"name": "HorizontalFlip"}, {"name": "GaussNoise"}],
    ):
        assert list_batched_steps(build_augmentation(specs)) is None


def test_a_resident_set_is_augmented_anew_each_epoch(image):
    augmentation = build_augmentation(POLICIES["light"])
    dataset = PreparedDataset(np.stack([image] * 3), np.arange(3), np.array([2, 0, 1]), augmentation, 0)
    resident = ResidentDataset(dataset, torch.device("cpu"))
    (first, targets), (second, _) = (resident.__getitems__([(epoch, 2), (epoch, 0)]) for epoch in (0, 1))
    assert first.dtype == torch.uint8
    assert first.shape == (2, 3, *image.shape[:2])
    assert targets.tolist() == [1, 2]
    assert not torch.equal(first, second)
