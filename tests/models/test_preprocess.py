import numpy as np
import pytest
import torch
from PIL import Image

from loupe.models.preprocess import Preprocess

PLAIN = ([0.0] * 3, [1.0] * 3)


def pixels(height, width, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (2, channels, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(("crop", "top", "left"), [((6, 4), 2, 3), ((10, 10), 0, 0), ((7, 3), 1, 3)])
def test_the_crop_is_central(crop, top, left):
    images = pixels(10, 10)
    expected = images[:, :, top : top + crop[0], left : left + crop[1]] / 255
    torch.testing.assert_close(Preprocess(crop, crop, 3, *PLAIN)(images), expected)


@pytest.mark.parametrize("size", [(9, 12), (48, 40)])
def test_resizing_is_bilinear_as_pillow_does_it(size):
    images = pixels(24, 24)
    resized = Preprocess((24, 24), size, 3, *PLAIN)(images)
    for channel in range(3):
        values = Image.fromarray(images[0, channel].numpy().astype(np.float32) / 255)
        expected = np.asarray(values.resize(size[::-1], Image.Resampling.BILINEAR))
        np.testing.assert_allclose(resized[0, channel], expected, atol=1e-4)


def test_an_image_of_the_right_size_is_scaled_to_one_and_no_more():
    images = pixels(8, 8)
    torch.testing.assert_close(Preprocess((8, 8), (8, 8), 3, *PLAIN)(images), images / 255)


def test_each_channel_is_normalised_by_its_own_mean_and_std():
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.4, 0.8)
    images = pixels(5, 5)
    values = Preprocess((5, 5), (5, 5), 3, mean, std)(images)
    for channel in range(3):
        torch.testing.assert_close(values[:, channel], (images[:, channel] / 255 - mean[channel]) / std[channel])


def test_a_grey_image_fills_three_channels():
    images = pixels(5, 5, channels=1)
    values = Preprocess((5, 5), (5, 5), 3, *PLAIN)(images)
    assert values.shape == (2, 3, 5, 5)
    torch.testing.assert_close(values, (images / 255).expand(-1, 3, -1, -1))


def test_one_channel_stays_one():
    assert Preprocess((5, 5), (16, 16), 1, [0.0], [1.0])(pixels(5, 5, channels=1)).shape == (2, 1, 16, 16)


def test_a_flat_image_stays_flat_whatever_its_way():
    images = torch.full((1, 3, 28, 28), 51, dtype=torch.uint8)
    values = Preprocess((20, 20), (64, 64), 3, [0.5] * 3, [0.5] * 3)(images)
    torch.testing.assert_close(values, torch.full((1, 3, 64, 64), -0.6))


def test_images_lie_in_memory_as_asked():
    for memory_format in (torch.channels_last, torch.contiguous_format):
        values = Preprocess((5, 5), (5, 5), 3, *PLAIN, memory_format)(pixels(5, 5))
        assert values.is_contiguous(memory_format=memory_format)


def test_its_constants_are_no_weights():
    assert Preprocess((5, 5), (5, 5), 3, *PLAIN).state_dict() == {}
