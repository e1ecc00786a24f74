"""Augmentation policies for albumentations, by name or written out."""

import difflib
import inspect
import os
import random
import warnings
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the network for a newer release

import albumentations as A
import numpy as np
from jaxtyping import UInt8

from loupe.data.batched import Flip, Move
from loupe.data.images import Geometry
from loupe.errors import ConfigError

Spec = dict[str, Any]

POLICIES: dict[str, list[Spec]] = {
    "none": [],
    # Small centred objects: mirror, and move by a pixel or two.
    "light": [
        {"name": "HorizontalFlip", "p": 0.5},
        {"name": "Affine", "translate_percent": (-0.07, 0.07), "scale": (0.93, 1.07), "rotate": (-5, 5), "p": 0.8},
    ],
    # Photos: framing, mirror, light and colour.
    "photo": [
        {"name": "RandomResizedCrop", "scale": (0.5, 1.0), "ratio": (0.8, 1.25), "p": 1.0},
        {"name": "HorizontalFlip", "p": 0.5},
        {"name": "ColorJitter", "brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.02, "p": 0.8},
    ],
    # Fixed cameras: how a part lies and is lit varies a little; nothing that could hide or fake a defect.
    "inspection": [
        {"name": "Affine", "translate_percent": (-0.02, 0.02), "rotate": (-2, 2), "border_mode": 4, "p": 0.8},
        {"name": "RandomBrightnessContrast", "brightness_limit": 0.05, "contrast_limit": 0.05, "p": 0.5},
    ],
}
SMALL_SIDE = 64


def choose_policy(policy: str | list[Spec], task: str, geometry: Geometry) -> tuple[str, list[Spec]]:
    """Resolve a policy to its name and its transforms, with sizes filled in from the geometry.

    Raises:
        ConfigError: if no policy has that name.
    """
    if isinstance(policy, list):
        name, specs = "custom", policy
    else:
        name = _choose_name(task, geometry) if policy == "auto" else policy
        if name not in POLICIES:
            raise ConfigError(
                f"augment.{task}: no policy is named {name!r}; expected auto, {', '.join(POLICIES)}, "
                "or a list of transforms"
            )
        specs = POLICIES[name]
    return name, [_fill_size(spec, geometry) for spec in specs]


def _choose_name(task: str, geometry: Geometry) -> str:
    if task == "detector":
        return "inspection"
    return "light" if min(geometry.height, geometry.width) < SMALL_SIDE else "photo"


def _fill_size(spec: Spec, geometry: Geometry) -> Spec:
    transform = getattr(A, str(spec.get("name")), None)
    takes_size = inspect.isclass(transform) and "size" in inspect.signature(transform.__init__).parameters
    return {"size": (geometry.height, geometry.width), **spec} if takes_size else dict(spec)


def build_augmentation(specs: Sequence[Spec]) -> A.Compose:
    """Make the transforms.

    Raises:
        ConfigError: if albumentations has no such transform, or the transform no such argument.
    """
    return A.Compose([_build_transform(spec) for spec in specs])


def _build_transform(spec: Spec) -> A.BasicTransform:
    name = spec.get("name")
    transform = getattr(A, str(name), None)
    if not (inspect.isclass(transform) and issubclass(transform, A.BasicTransform)):
        near = difflib.get_close_matches(str(name), dir(A), n=3)
        raise ConfigError(f"augment: albumentations has no transform {name!r}; nearest: {', '.join(near) or 'none'}")
    arguments = {
        key: tuple(value) if isinstance(value, list) else value for key, value in spec.items() if key != "name"
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # unknown arguments are only warned about, then dropped
        try:
            return transform(**arguments)
        except (UserWarning, TypeError, ValueError) as error:
            raise ConfigError(
                f"augment: {name} does not take these arguments: {' '.join(str(error).split())}"
            ) from error


def list_batched_steps(augmentation: A.Compose) -> list[Flip | Move] | None:
    """The same transforms for whole batches; None where one of them is not among those."""
    steps = [_build_step(transform) for transform in augmentation.transforms]
    return None if None in steps else [step for step in steps if step is not None]


def _build_step(transform: A.BasicTransform) -> Flip | Move | None:
    if isinstance(transform, A.HorizontalFlip | A.VerticalFlip):
        return Flip(transform.p, 3 if isinstance(transform, A.HorizontalFlip) else 2)
    if not isinstance(transform, A.Affine):
        return None
    plain = A.Affine()
    kept = ("shear", "fit_output", "keep_ratio", "balanced_scale", "border_mode", "fill", "interpolation")
    moves_by_pixels = transform.translate_px not in (None, plain.translate_px)
    if moves_by_pixels or any(getattr(transform, name) != getattr(plain, name) for name in kept):
        return None
    shift = transform.translate_percent or {"x": (0.0, 0.0), "y": (0.0, 0.0)}
    return Move(transform.p, transform.scale["x"], transform.scale["y"], shift["x"], shift["y"], transform.rotate)


def augment_image(
    augmentation: A.Compose, image: UInt8[np.ndarray, "height width channels"], seed: Sequence[int]
) -> UInt8[np.ndarray, "height width channels"]:
    """Augment one image. The same seed gives the same result, in whatever process and order.

    Raises:
        ConfigError: if the transforms can't be applied to it, or change its size or type.
    """
    _seed(augmentation, seed)
    try:
        augmented = augmentation(image=image)["image"]
    except Exception as error:  # there are as many kinds as transforms
        size, reason = " x ".join(map(str, image.shape)), " ".join(str(error).split())
        raise ConfigError(f"augment: the transforms can't be applied to images of {size}: {reason}") from error
    return _check(augmented, image)


def augment_versions(
    augmentation: A.Compose,
    images: Sequence[UInt8[np.ndarray, "height width channels"]],
    seed: int,
    num_versions: int,
) -> list[list[UInt8[np.ndarray, "height width channels"]]]:
    """A row for each image: the original, then augmented versions of it.

    Raises:
        ConfigError: if the transforms can't be applied, or change size or type.
    """
    return [
        [image, *(augment_image(augmentation, image, (seed, version, row)) for version in range(num_versions))]
        for row, image in enumerate(images)
    ]


def _seed(augmentation: A.Compose, seed: Sequence[int]) -> None:
    """One pair of generators for all transforms: a seed for each would make their draws equal, and their uses agree."""
    generator = np.random.default_rng(seed)
    augmentation.set_random_state(generator, random.Random(int(generator.integers(2**63))))  # noqa: S311


def _check(
    augmented: np.ndarray, image: UInt8[np.ndarray, "height width channels"]
) -> UInt8[np.ndarray, "height width channels"]:
    if augmented.dtype != np.uint8 or augmented.shape[:2] != image.shape[:2]:
        raise ConfigError(
            f"augment: the transforms must keep the size {image.shape[:2]} and uint8 values, "
            f"got {augmented.shape[:2]} and {augmented.dtype}; remove what resizes or converts"
        )
    return augmented.reshape(image.shape)
