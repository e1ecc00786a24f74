"""Dividing images into train, val, calibration and test, and what can be trained on the result."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from loupe.errors import DataError

SPLITS = ("train", "val", "calibration", "test")
_MOST_HELD_OUT_FIRST = ("test", "val", "train")


@dataclass(frozen=True)
class Fractions:
    """The part of the images that each held-out split gets; train gets the rest."""

    val: float
    calibration: float
    test: float


@dataclass(frozen=True)
class Tasks:
    """What the data allows to train, and in words why not the rest.

    `labels` are the classifier's classes in order, empty where there is no classifier;
    `normal_label` is the detector's normal class, None where there is no detector.
    """

    labels: list[str]
    normal_label: str | None
    no_classifier_because: str | None
    no_detector_because: str | None

    def to_json(self) -> dict[str, Any]:
        """Values that `Tasks(**values)` takes."""
        return asdict(self)


def assign_splits(manifest: pd.DataFrame, fractions: Fractions, seed: int) -> pd.DataFrame:
    """Assign each distinct image content to one split.

    A given split is kept; content that was given to several goes to the most held out of them. What is missing is
    carved from the rest (val and calibration from train; test too, where there is none), stratified by label. The
    order within a label follows from a hash of seed and content, not from the order of rows.

    Returns:
        image_id and split, one row a content, sorted by image_id.

    Raises:
        DataError: if a label has too few images to be in every split that must be carved.
    """
    contents = _one_row_a_content(manifest)
    if "val" in contents["given_split"].to_numpy() and "test" not in contents["given_split"].to_numpy():
        contents["given_split"] = contents["given_split"].replace("val", "test")
    wanted = {"test": fractions.test, "val": fractions.val, "calibration": fractions.calibration}
    given = set(contents["given_split"].dropna())
    carved = {split: fraction for split, fraction in wanted.items() if split not in given}
    contents["split"] = contents["given_split"].fillna("train")
    for label, rows in contents[contents["split"].eq("train")].groupby("label"):
        ranked = sorted(rows.index, key=lambda row: _rank(seed, str(contents.at[row, "image_id"])))
        for split, taken in _carve(ranked, carved, str(label)).items():
            contents.loc[taken, "split"] = split
    return contents[["image_id", "split"]].sort_values("image_id").reset_index(drop=True)


def _one_row_a_content(manifest: pd.DataFrame) -> pd.DataFrame:
    """The most held-out given split wins, so that no content of a given test set is ever trained on."""
    order = manifest["given_split"].map({split: rank for rank, split in enumerate(_MOST_HELD_OUT_FIRST)})
    rows = manifest.assign(order=order).sort_values(["image_id", "order", "path"])
    return rows.drop_duplicates("image_id")[["image_id", "label", "given_split"]].reset_index(drop=True)


def _rank(seed: int, image_id: str) -> str:
    return hashlib.sha256(f"{seed} {image_id}".encode()).hexdigest()


def _carve(ranked: list[int], fractions: dict[str, float], label: str) -> dict[str, list[int]]:
    """Cut the head of the list into one piece a split, each of at least one image."""
    sizes = {split: max(1, round(fraction * len(ranked))) for split, fraction in fractions.items()}
    needed = len(fractions) + 1
    if len(ranked) < needed or sum(sizes.values()) >= len(ranked):
        raise DataError(
            f"class {label!r} has {len(ranked)} images, too few to split into train, {', '.join(fractions)}: "
            f"expected at least {needed} and, with these fractions, some left for train; add images or remove the class"
        )
    pieces, start = {}, 0
    for split, size in sizes.items():
        pieces[split] = ranked[start : start + size]
        start += size
    return pieces


def find_leaks(manifest: pd.DataFrame) -> pd.DataFrame:
    """Contents that the source folder gives to more than one split: image_id, and the paths of each."""
    given = manifest.dropna(subset="given_split")
    crossing = given.groupby("image_id")["given_split"].transform("nunique") > 1
    return given.loc[crossing].groupby("image_id")["path"].agg(", ".join).reset_index()


def compute_tasks(manifest: pd.DataFrame, splits: pd.DataFrame, normal_labels: Sequence[str]) -> Tasks:
    """Decide what to train: a classifier on two or more classes, a detector where there is a normal class.

    Raises:
        DataError: if there is nothing to train on.
    """
    rows = manifest.merge(splits, on="image_id")
    labels = sorted(rows.loc[rows["split"].eq("train"), "label"].unique())
    if not labels:
        raise DataError("no image is left to train on: expected a train folder, or images without a given split")
    normal_label = next((label for label in normal_labels if label in labels), None)
    anomalous = rows["split"].eq("test") & rows["label"].ne(str(normal_label))
    few = len(labels) < 2
    no_detector = None
    if normal_label is None:
        no_detector = f"none of split.normal_labels ({', '.join(normal_labels)}) is among the training classes"
    elif not anomalous.any():
        normal_label, no_detector = None, f"the test images are all {normal_label!r}: none is anomalous"
    return Tasks(
        labels=[] if few else labels,
        normal_label=normal_label,
        no_classifier_because=f"there is one class to train on ({labels[0]})" if few else None,
        no_detector_because=no_detector,
    )


def load_tasks(path: Path) -> Tasks:
    """Read `Tasks.to_json()` from a file."""
    return Tasks(**json.loads(path.read_text(encoding="utf-8")))
