import numpy as np
import pandas as pd
import pytest

from loupe.config import load_params
from loupe.data.images import Geometry
from loupe.data.prepare import Prepared
from loupe.stages.train_classifier import build_config, choose_recipe

PHOTOS = Geometry(256, 256, 3, 224, 224, 224, 224, "crop", "bicubic")
SMALL = Geometry(28, 28, 1, 28, 28, 64, 64, "crop", "bicubic")
HALO = Geometry(292, 292, 3, 256, 256, 256, 256, "crop", "bicubic")
CHOSEN = Geometry(320, 320, 3, 320, 320, 320, 320, "crop", "bicubic")


def prepare(num_images, geometry):
    images = np.zeros((1, geometry.height, geometry.width, geometry.channels), np.uint8)
    masks = np.zeros((0, *images.shape[1:3]), np.uint8)
    return Prepared(images, masks, pd.DataFrame({"split": ["train"] * num_images}), geometry)


@pytest.mark.parametrize(
    ("num_images", "knobs", "expected"),
    [
        (1_999, {}, (1e-4, 1e-5, 0.5, False)),
        (1_999, {"recipe": "scratch"}, (2e-3, None, 0.0, True)),
        (1_999, {"weights": "none"}, (2e-3, None, 0.0, True)),
        (2_000, {}, (2e-3, None, 0.0, True)),
        (2_000, {"learning_rate": 0.1, "frozen": 0.25}, (0.1, None, 0.25, True)),
    ],
)
def test_few_images_change_less_of_a_pretrained_network(num_images, knobs, expected):
    section = load_params().train_classifier.model_copy(update=knobs)
    recipe = choose_recipe(section, prepare(num_images, PHOTOS))
    assert (recipe.learning_rate, recipe.epsilon, recipe.frozen, recipe.adapts_batch_norm) == expected


@pytest.mark.parametrize(
    ("num_images", "geometry", "knobs", "refits"),
    [
        (130, PHOTOS, {}, True),
        (150, PHOTOS, {}, False),  # there is no time
        (150, PHOTOS, {"epochs": 5}, True),
        (130, PHOTOS, {"refit": False}, False),
        (130, PHOTOS, {"recipe": "features"}, False),
        (130, PHOTOS, {"recipe": "scratch"}, False),
        (130, PHOTOS, {"schedule": "plateau"}, False),
        (1_500, SMALL, {}, True),
        (9_000, SMALL, {}, False),
        (9_000, SMALL, {"refit": True}, True),
    ],
)
def test_few_images_are_trained_on_again_with_those_of_val(num_images, geometry, knobs, refits):
    section = load_params().train_classifier.model_copy(update=knobs)
    assert choose_recipe(section, prepare(num_images, geometry)).refits == refits


@pytest.mark.parametrize(
    ("num_images", "geometry", "knobs", "size"),
    [
        (100, PHOTOS, {}, 256),
        (100, PHOTOS, {"recipe": "features"}, 256),
        (100, PHOTOS, {"recipe": "scratch_augmented"}, 224),
        (100, PHOTOS, {"backbone": "vit_tiny_patch16_224"}, 224),
        (100, HALO, {"backbone": "halonet26t"}, 256),  # which takes no 288
        (100, SMALL, {}, 64),
        (100, CHOSEN, {}, 320),
        (2_000, PHOTOS, {}, 224),
    ],
)
def test_of_few_photos_a_pretrained_network_sees_more_than_it_learns_from(num_images, geometry, knobs, size):
    section = load_params().train_classifier.model_copy(update=knobs)
    prepared = prepare(num_images, geometry)
    assert build_config(section, "package", prepared, ["a", "b"]).size == (size, size)
    assert choose_recipe(section, prepared).size == (geometry.input_height, geometry.input_width)
