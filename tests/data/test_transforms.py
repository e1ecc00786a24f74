import numpy as np
import pytest

from loupe.data.images import Geometry
from loupe.data.transforms import (
    POLICIES,
    augment_image,
    augment_versions,
    build_augmentation,
    choose_policy,
)
from loupe.errors import ConfigError


def square(side, channels=3):
    return Geometry(side, side, channels, side, side, side, side, "crop", "bilinear")


@pytest.fixture
def image(draw):
    return np.asarray(draw(0, (32, 32)))


@pytest.mark.parametrize(
    ("task", "side", "name"),
    [("classifier", 28, "light"), ("classifier", 256, "photo"), ("detector", 28, "inspection")],
)
def test_the_policy_is_chosen_by_task_and_size(task, side, name):
    assert choose_policy("auto", task, square(side))[0] == name


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_that_is_asked_for_is_taken(name):
    assert choose_policy(name, "classifier", square(256))[0] == name


def test_sizes_are_filled_in_from_the_geometry():
    _, specs = choose_policy("photo", "classifier", square(256))
    assert specs[0]["size"] == (256, 256)
    assert "size" not in specs[1]


def test_a_size_that_is_written_out_is_kept():
    _, specs = choose_policy([{"name": "RandomResizedCrop", "size": [32, 32]}], "classifier", square(256))
    assert specs[0]["size"] == [32, 32]


def test_choosing_leaves_the_policies_as_they_are():
    choose_policy("photo", "classifier", square(256))
    assert "size" not in POLICIES["photo"][0]


def test_an_unknown_policy_is_a_config_error_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"augment\.detector: no policy is named 'heavy'; expected auto, none, light"):
        choose_policy("heavy", "detector", square(28))


def test_an_unknown_transform_is_a_config_error_with_the_nearest_name():
    with pytest.raises(ConfigError, match="no transform 'HorizontalFlop'; nearest: HorizontalFlip"):
        build_augmentation([{"name": "HorizontalFlop"}])


@pytest.mark.parametrize("spec", [{}, {"name": None}, {"name": "Compose"}, {"name": "__doc__"}])
def test_what_is_no_transform_is_a_config_error(spec):
    with pytest.raises(ConfigError, match="has no transform"):
        build_augmentation([spec])


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "HorizontalFlip", "probability": 0.5},
        {"name": "Affine", "rotates": (-5, 5)},
        {"name": "HorizontalFlip", "p": 2},
        {"name": "GaussianBlur", "blur_limit": "much"},
        {"name": "RandomResizedCrop"},
    ],
)
def test_an_argument_that_a_transform_does_not_take_is_a_config_error(spec):
    with pytest.raises(ConfigError, match=f"{spec['name']} does not take these arguments"):
        build_augmentation([spec])


def test_lists_stand_for_tuples(image):
    augmentation = build_augmentation([{"name": "Affine", "rotate": [10, 20], "p": 1.0}])
    assert not np.array_equal(augment_image(augmentation, image, (0,)), image)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_keeps_shape_and_type(image, name, channels):
    _, specs = choose_policy(name, "classifier", square(32, channels))
    augmented = augment_image(build_augmentation(specs), image[:, :, :channels], (0, 1))
    assert augmented.shape == (32, 32, channels)
    assert augmented.dtype == np.uint8


@pytest.mark.parametrize("spec", [{"name": "CenterCrop", "height": 8, "width": 8}, {"name": "ToFloat", "p": 1.0}])
def test_a_transform_that_changes_shape_or_type_is_a_config_error(image, spec):
    with pytest.raises(ConfigError):
        augment_image(build_augmentation([spec]), image, (0,))


def test_a_transform_that_fails_is_a_config_error(image):
    with pytest.raises(ConfigError, match=f"the transforms can't be applied to images of {image.shape[0]} x "):
        augment_image(build_augmentation([{"name": "RandomCrop", "height": 500, "width": 500}]), image, (0,))


def test_none_changes_nothing(image):
    np.testing.assert_array_equal(augment_image(build_augmentation([]), image, (0, 1)), image)


@pytest.mark.parametrize("name", ["light", "photo", "inspection"])
def test_the_same_seed_gives_the_same_image_in_whatever_order(image, name):
    augmentation = build_augmentation(choose_policy(name, "classifier", square(32))[1])
    forwards = [augment_image(augmentation, image, (0, index)) for index in range(6)]
    backwards = [augment_image(augmentation, image, (0, index)) for index in reversed(range(6))]
    np.testing.assert_array_equal(forwards, backwards[::-1])


@pytest.mark.parametrize("other", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_each_part_of_the_seed_counts(image, other):
    augmentation = build_augmentation([{"name": "Affine", "rotate": (-40, 40), "p": 1.0}])
    first = augment_image(augmentation, image, (0, 0, 0))
    assert not np.array_equal(first, augment_image(augmentation, image, other))


def test_global_seeds_do_not_count(image):
    augmentation = build_augmentation([{"name": "Affine", "rotate": (-40, 40), "p": 1.0}])
    first = augment_image(augmentation, image, (0,))
    np.random.seed(5)  # noqa: NPY002 (the very seed that must not count)
    np.testing.assert_array_equal(first, augment_image(augmentation, image, (0,)))


def test_augmenting_does_not_change_its_image(image):
    before = image.copy()
    augment_image(build_augmentation([{"name": "RandomBrightnessContrast", "p": 1.0}]), image, (0,))
    np.testing.assert_array_equal(image, before)


def test_versions_are_a_row_for_each_image_with_the_original_first(image):
    augmentation = build_augmentation([{"name": "Affine", "rotate": (-40, 40), "p": 1.0}])
    rows = augment_versions(augmentation, [image, image], 3, num_versions=2)
    assert [len(row) for row in rows] == [3, 3]
    assert all(row[0] is image for row in rows)
    np.testing.assert_array_equal(rows[1][2], augment_image(augmentation, image, (3, 1, 1)))


def test_transforms_of_one_policy_draw_independently():
    """With one seed for each, a flip would come with every rotation: both would read the same first number."""
    specs = [{"name": "HorizontalFlip", "p": 0.5}, {"name": "VerticalFlip", "p": 0.5}]
    augmentation = build_augmentation(specs)
    image = np.arange(4, dtype=np.uint8).reshape(2, 2, 1)
    seen = {augment_image(augmentation, image, (0, 0, number)).tobytes() for number in range(64)}
    assert len(seen) == 4


@pytest.mark.parametrize("policy", ["light", "inspection"])
def test_images_are_shifted_to_either_side(policy):
    """A single number would be a fixed shift."""
    affine = build_augmentation([spec for spec in POLICIES[policy] if spec["name"] == "Affine"]).transforms[0]
    for axis in ("x", "y"):
        least, most = affine.translate_percent[axis]
        assert least == -most < 0
