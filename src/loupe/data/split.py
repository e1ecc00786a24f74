"""Dividing images into train, val, calibration and test, and what can be trained on the result."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from loupe.errors import DataError

SPLITS = ("train", "val", "calibration", "test")
LEFT_OUT = "left out"
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


def list_contents(manifest: pd.DataFrame) -> pd.DataFrame:
    """One row a content: image_id, label, group and given_split, sorted by image_id.

    Of several given splits the most held out wins, so that no content of a given test set is ever trained on.
    """
    order = manifest["given_split"].map({split: rank for rank, split in enumerate(_MOST_HELD_OUT_FIRST)})
    group = manifest.groupby("image_id")["group"].transform("first")  # the first that is not missing
    rows = manifest.assign(order=order, group=group).sort_values(["image_id", "order", "path"])
    rows = rows.drop_duplicates("image_id")[["image_id", "label", "group", "given_split"]].reset_index(drop=True)
    if "val" in rows["given_split"].to_numpy() and "test" not in rows["given_split"].to_numpy():
        rows["given_split"] = rows["given_split"].replace("val", "test")
    return rows


def assign_splits(
    contents: pd.DataFrame, fractions: Fractions, seed: int, previous: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Assign each content to one split, a cluster as a whole.

    A given split is kept. What is missing is carved from the images that are to be trained on (val and calibration;
    test too, where none is given), stratified by label, in an order that follows from a hash of seed and content.
    An image without a given split joins what is held out of its cluster.
    What an earlier call assigned stays where it was, and new members of its clusters join it; a new image that would
    tie together clusters of two splits is left out.

    Args:
        contents: from `list_contents`, with a column `cluster`.
        previous: image_id and split, from an earlier call with the same seed and fractions.

    Returns:
        image_id and split, one row a content that is not left out, sorted by image_id.

    Raises:
        DataError: if a label has too few images to be in every split that must be carved.
    """
    wanted = {"test": fractions.test, "val": fractions.val, "calibration": fractions.calibration}
    given = set(contents["given_split"].dropna())
    carved = {split: fraction for split, fraction in wanted.items() if split not in given}
    held_out = contents["given_split"].isin(set(given) - {"train"})
    splits = contents["given_split"].where(held_out).astype("object")
    joined = contents["cluster"].map(_find_held_out(contents[held_out])).where(contents["given_split"].isna())
    splits, held_out = splits.fillna(joined), held_out | joined.notna()
    pool = contents[~held_out]
    settled = _recall(pool, previous, set(carved) | {"train"})
    homes = _find_homes(pool, settled)
    for label, rows in pool.groupby("label"):
        homes |= _divide(rows, settled, homes, carved, seed, str(label))
    splits.loc[pool.index] = [
        settled.get(image_id, homes[cluster])
        for image_id, cluster in zip(pool["image_id"], pool["cluster"], strict=True)
    ]
    table = pd.DataFrame({"image_id": contents["image_id"], "split": splits})
    return table[table["split"].ne(LEFT_OUT)].sort_values("image_id", ignore_index=True)


def _recall(pool: pd.DataFrame, previous: pd.DataFrame | None, allowed: set[str]) -> dict[str, str]:
    """The split of each content that had one."""
    if previous is None:
        return {}
    known = previous[previous["image_id"].isin(pool["image_id"]) & previous["split"].isin(allowed)]
    return dict(zip(known["image_id"], known["split"], strict=True))


def _find_held_out(rows: pd.DataFrame) -> dict[int, str]:
    """The split of each cluster of these images; LEFT_OUT where they are in two."""
    found: dict[int, set[str]] = {}
    for cluster, split in zip(rows["cluster"], rows["given_split"], strict=True):
        found.setdefault(cluster, set()).add(split)
    return _agree(found)


def _find_homes(pool: pd.DataFrame, settled: dict[str, str]) -> dict[int, str]:
    """The split that new members of a cluster join, for clusters that have settled members."""
    found: dict[int, set[str]] = {}
    for image_id, cluster in zip(pool["image_id"], pool["cluster"], strict=True):
        if image_id in settled:
            found.setdefault(cluster, set()).add(settled[image_id])
    return _agree(found)


def _agree(found: dict[int, set[str]]) -> dict[int, str]:
    return {cluster: next(iter(splits)) if len(splits) == 1 else LEFT_OUT for cluster, splits in found.items()}


def _divide(
    rows: pd.DataFrame,
    settled: dict[str, str],
    homes: dict[int, str],
    fractions: dict[str, float],
    seed: int,
    label: str,
) -> dict[int, str]:
    """Homes for the clusters of one label that have none yet."""
    quotas = {split: max(1, round(fraction * len(rows))) for split, fraction in fractions.items()}
    filled: Counter[str] = Counter()
    homeless: dict[int, list[str]] = {}
    for image_id, cluster in zip(rows["image_id"], rows["cluster"], strict=True):
        if image_id in settled or cluster in homes:
            filled[settled.get(image_id) or homes[cluster]] += 1
        else:
            homeless.setdefault(cluster, []).append(image_id)
    chosen: dict[int, str] = {}
    for cluster, members in sorted(homeless.items(), key=lambda item: _rank(seed, min(item[1]))):
        chosen[cluster] = _choose_home(len(members), quotas, filled)
        filled[chosen[cluster]] += len(members)
    _fill_empty(chosen, homeless, fractions, filled)
    _check_all_filled(filled, fractions, label, len(rows), rows["cluster"].nunique(), bool(settled))
    return chosen


def _choose_home(size: int, quotas: dict[str, int], filled: Counter[str]) -> str:
    """The first empty split, which may be overfilled by half, then the first with room for the whole cluster."""
    fitting = [split for split, quota in quotas.items() if not filled[split] and size <= 1.5 * quota]
    fitting += [split for split, quota in quotas.items() if filled[split] + size <= quota]
    return fitting[0] if fitting else "train"


def _fill_empty(
    chosen: dict[int, str], homeless: dict[int, list[str]], fractions: dict[str, float], filled: Counter[str]
) -> None:
    """Where clusters are so large that a split got none, it gets the smallest that train can spare."""
    spare = sorted((cluster for cluster in chosen if chosen[cluster] == "train"), key=lambda one: len(homeless[one]))
    for split in fractions:
        if not filled[split] and spare and filled["train"] > len(homeless[spare[0]]):
            cluster = spare.pop(0)
            chosen[cluster] = split
            filled.update({split: len(homeless[cluster]), "train": -len(homeless[cluster])})


def _check_all_filled(
    filled: Counter[str], fractions: dict[str, float], label: str, images: int, clusters: int, is_settled: bool
) -> None:
    empty = [split for split in ("train", *fractions) if not filled[split]]
    if empty:
        alike = f" in {clusters} groups of like ones" if clusters < images else ""
        raise DataError(
            f"class {label!r} has {images} images{alike}, too few to split into train, {', '.join(fractions)} "
            f"({', '.join(empty)} would be empty): expected at least {len(fractions) + 1} and, with these fractions, "
            "some left for train; add images or remove the class"
            + (", or remove data/split, by which images keep the split that they had" if is_settled else "")
        )


def _rank(seed: int, image_id: str) -> str:
    return hashlib.sha256(f"{seed} {image_id}".encode()).hexdigest()


def find_leaks(contents: pd.DataFrame, pairs: pd.DataFrame, split_column: str) -> pd.DataFrame:
    """Near-duplicates, and members of one group, that are in different splits.

    Args:
        contents: image_id, group and `split_column`, one row a content.
        pairs: first and second, from `find_near_duplicates`.

    Returns:
        first, second, first_split, second_split: one row a pair; of a group, its first member with each that strays.
    """
    splits = contents.dropna(subset=split_column).set_index("image_id")[split_column]
    grouped = contents.dropna(subset=["group", split_column])
    of_groups = pd.DataFrame(
        {"first": grouped.groupby("group")["image_id"].transform("first"), "second": grouped["image_id"]}
    )
    joined = pd.concat([pairs[["first", "second"]], of_groups], ignore_index=True)
    joined = joined.assign(first_split=joined["first"].map(splits), second_split=joined["second"].map(splits)).dropna()
    return joined[joined["first_split"].ne(joined["second_split"])].reset_index(drop=True)


def find_copies_across_splits(manifest: pd.DataFrame) -> pd.DataFrame:
    """Contents that the source folder gives to more than one split: image_id, and the paths of each."""
    given = manifest.dropna(subset="given_split")
    crossing = given.groupby("image_id")["given_split"].transform("nunique") > 1
    return given.loc[crossing].groupby("image_id")["path"].agg(", ".join).reset_index()


def compute_tasks(manifest: pd.DataFrame, splits: pd.DataFrame, normal_labels: Sequence[str]) -> Tasks:
    """Decide what to train: a classifier on two or more classes, a detector where there is a normal class.

    Raises:
        DataError: if there is nothing to train on, or a class is missing from val or test.
    """
    rows = manifest.merge(splits, on="image_id")
    labels = sorted(rows.loc[rows["split"].eq("train"), "label"].unique())
    if not labels:
        raise DataError("no image is left to train on: expected a train folder, or images without a given split")
    lost = sorted(set(manifest.loc[manifest["given_split"].isin(["train"]), "label"]) - set(labels))
    if lost:
        raise DataError(
            f"no image of {lost[0]!r} is left to train on: all that are in train are in val or test as well"
        )
    normal_label = next((label for label in normal_labels if label in labels), None)
    is_test, is_normal = rows["split"].eq("test"), rows["label"].eq(str(normal_label))
    few = len(labels) < 2
    if not few:
        _check_no_class_is_missing(rows, labels)
    no_detector = None
    if normal_label is None:
        no_detector = f"none of split.normal_labels ({', '.join(normal_labels)}) is among the training classes"
    elif not (is_test & ~is_normal).any():
        normal_label, no_detector = None, f"the test images are all {normal_label!r}: none is anomalous"
    elif not (is_test & is_normal).any():
        normal_label, no_detector = None, f"no test image is {normal_label!r}: false alarms could not be counted"
    elif not (rows["split"].eq("val") & is_normal).any():
        normal_label, no_detector = None, f"no image of val is {normal_label!r}: a fit could not be watched"
    return Tasks(
        labels=[] if few else labels,
        normal_label=normal_label,
        no_classifier_because=f"there is one class to train on ({labels[0]})" if few else None,
        no_detector_because=no_detector,
    )


def _check_no_class_is_missing(rows: pd.DataFrame, labels: Sequence[str]) -> None:
    for split in ("val", "test"):
        missing = sorted(set(labels) - set(rows.loc[rows["split"].eq(split), "label"]))
        if missing:
            raise DataError(
                f"{split} has no image of {', '.join(map(repr, missing))}: every class that is trained on must be "
                "in val and test; add images there, or remove the class"
            )


def load_tasks(path: Path) -> Tasks:
    """Read `Tasks.to_json()` from a file."""
    return Tasks(**json.loads(path.read_text(encoding="utf-8")))
