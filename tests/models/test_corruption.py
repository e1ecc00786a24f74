import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loupe.models.detectors.corruption import (
    BLOCK,
    compute_perlin,
    corrupt,
    draw_blots,
    draw_foreign,
    draw_rectangles,
    mask_blocks,
    paste_defects,
)

CPU = torch.device("cpu")


def draw_images(num_images=8, channels=3, height=40, width=24):
    return 0.2 + 0.6 * torch.rand(num_images, channels, height, width, generator=torch.Generator().manual_seed(0))


def has_changed(images, corrupted):
    return (images != corrupted).any(dim=1)


def test_nothing_is_corrupted_where_all_is_0():
    images = draw_images()
    assert torch.equal(corrupt(images, noise=0.0, masked=0.0, defects=0.0), images)


@given(
    noise=st.floats(0, 1),
    masked=st.floats(0, 1),
    defects=st.floats(0, 1),
    channels=st.sampled_from([1, 3]),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    num_images=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_corrupted_images_are_images(noise, masked, defects, channels, rows, columns, num_images):
    images = draw_images(num_images, channels, BLOCK * rows, BLOCK * columns)
    before = images.clone()
    corrupted = corrupt(images, noise, masked, defects)
    assert corrupted.shape == images.shape
    assert 0 <= corrupted.min() <= corrupted.max() <= 1
    assert torch.equal(images, before)


def test_the_same_seed_draws_the_same_and_another_seed_something_else():
    images = draw_images()
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(corrupt(images, 0.1, 0.2, 0.8))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_noise_has_the_standard_deviation_that_was_asked_for():
    torch.manual_seed(0)
    images = torch.full((4, 1, 64, 64), 0.5)
    noise = corrupt(images, 0.05, 0.0, 0.0) - images
    assert float(noise.std()) == pytest.approx(0.05, rel=0.05)
    assert abs(float(noise.mean())) < 0.005


def test_masked_blocks_are_black_and_whole_and_as_many_as_was_asked_for():
    torch.manual_seed(0)
    images = draw_images(16, 3, 64, 96)
    masked = mask_blocks(images, 0.3)
    is_black = (masked == 0).all(dim=1)
    blocks = is_black.unflatten(1, (-1, BLOCK)).unflatten(3, (-1, BLOCK))
    assert torch.equal(blocks.all(dim=(2, 4)), blocks.any(dim=(2, 4)))
    assert float(is_black.float().mean()) == pytest.approx(0.3, abs=0.04)
    assert torch.equal(masked, images * ~is_black[:, None])


def test_as_many_images_get_a_defect_as_was_asked_for():
    torch.manual_seed(0)
    images = draw_images(400, 1, 32, 32)
    is_spoilt = has_changed(images, paste_defects(images, 0.25)).any(dim=(1, 2))
    assert float(is_spoilt.float().mean()) == pytest.approx(0.25, abs=0.06)
    assert has_changed(images, paste_defects(images, 1.0)).any(dim=(1, 2)).all()


def test_a_defect_leaves_most_of_the_image_as_it_was():
    torch.manual_seed(0)
    images = draw_images(100, 3, 64, 64)
    parts = has_changed(images, paste_defects(images, 1.0)).float().mean(dim=(1, 2))
    assert parts.max() < 0.6
    assert parts.mean() < 0.25


def test_rectangles_are_rectangles_of_the_areas_that_are_wanted():
    torch.manual_seed(0)
    for rectangle in draw_rectangles(50, 64, 96, CPU):
        rows, columns = rectangle.any(dim=1).nonzero(), rectangle.any(dim=0).nonzero()
        height, width = rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
        assert rectangle.sum() == height * width
        assert height * width <= 0.17 * 64 * 96


@pytest.mark.parametrize("sides", [(8, 16), (32, 32), (128, 64)])
def test_blots_are_in_every_image_and_each_is_another(sides):
    torch.manual_seed(0)
    blots = draw_blots(20, *sides, CPU)
    parts = blots.float().mean(dim=(1, 2))
    assert parts.min() > 0
    assert parts.max() < 0.7
    assert len({blot.numpy().tobytes() for blot in blots}) == 20


def test_what_is_pasted_comes_from_the_batch_and_one_colour():
    torch.manual_seed(0)
    images = torch.zeros(6, 3, 16, 24)
    foreign = draw_foreign(images)
    assert torch.equal(foreign, foreign[:, :, :1, :1].expand_as(foreign))
    assert foreign.std(dim=0).min() > 0


def compute_slow_perlin(angles, cells, height, width):
    """Perlin's noise pixel by pixel, as it is described."""
    noise = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            y, x = (i + 0.5) / height * cells[0], (j + 0.5) / width * cells[1]
            row, column = math.floor(y), math.floor(x)
            for below in (0, 1):
                for right in (0, 1):
                    angle = angles[row + below, column + right]
                    rise = math.cos(angle) * (x - column - right) + math.sin(angle) * (y - row - below)
                    weights = [6 * t**5 - 15 * t**4 + 10 * t**3 for t in (y - row, x - column)]
                    weights = [w if far else 1 - w for w, far in zip(weights, (below, right), strict=True)]
                    noise[i, j] += rise * weights[0] * weights[1]
    return math.sqrt(2) * noise


def test_perlin_noise_is_what_its_description_gives():
    angles = 2 * math.pi * torch.rand(2, 9, 9, generator=torch.Generator().manual_seed(0))
    cells = torch.tensor([[2, 8], [4, 4]])
    noise = compute_perlin(angles, cells, 24, 32)
    for image in range(2):
        expected = compute_slow_perlin(angles[image].numpy(), cells[image].tolist(), 24, 32)
        np.testing.assert_allclose(noise[image], expected, atol=1e-5)
    assert noise.abs().max() <= 1
