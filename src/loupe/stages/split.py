"""Divide the images into train, val, calibration and test, and decide what can be trained."""

import json
import logging

import pandas as pd

from loupe.config import Params
from loupe.config import Split as Section
from loupe.data.duplicates import compute_clusters, find_near_duplicates
from loupe.data.manifest import load_table, save_table
from loupe.data.split import SPLITS as SPLIT_NAMES
from loupe.data.split import (
    Fractions,
    assign_splits,
    compute_tasks,
    find_copies_across_splits,
    find_leaks,
    list_contents,
)
from loupe.errors import DataError
from loupe.stages.entry import save_json
from loupe.stages.files import MANIFEST, QUALITY, SPLIT_RULES, SPLITS, TASKS

log = logging.getLogger(__name__)


def split(params: Params) -> None:
    section, manifest = params.split, load_table(MANIFEST)
    contents = list_contents(manifest)
    looks = manifest.drop_duplicates("image_id")[["image_id", "label", "phash"]].merge(
        load_table(QUALITY), on="image_id"
    )
    pairs = find_near_duplicates(looks)
    contents = contents.assign(cluster=compute_clusters(contents, pairs))
    _tell_of_given_leaks(manifest, contents, pairs)
    rules = {"seed": params.seed, **section.model_dump(exclude={"normal_labels"})}
    splits = assign_splits(contents, _build_fractions(section), params.seed, _recall(rules))
    _refuse_leaks(contents.merge(splits, on="image_id"), pairs)
    tasks = compute_tasks(manifest, splits, section.normal_labels)
    save_table(splits, SPLITS)
    save_json(rules, SPLIT_RULES)
    save_json(tasks.to_json(), TASKS)
    sizes = splits["split"].value_counts()
    largest = contents["cluster"].value_counts().max()
    log.info("%d near-duplicate pairs; the largest cluster has %d images", len(pairs), largest)
    log.info("images: %s", ", ".join(f"{name} {sizes.get(name, 0)}" for name in SPLIT_NAMES))
    if len(splits) < len(contents):
        log.warning("%d new images tie together images of two splits, and are left out", len(contents) - len(splits))
    log.info("classifier: %s", tasks.no_classifier_because or f"{len(tasks.labels)} classes")
    log.info("detector: %s", tasks.no_detector_because or f"normal is {tasks.normal_label!r}")


def _build_fractions(section: Section) -> Fractions:
    return Fractions(section.val_fraction, section.calibration_fraction, section.test_fraction)


def _recall(rules: dict[str, object]) -> pd.DataFrame | None:
    """The splits of an earlier run by the same rules: what was assigned stays."""
    if not SPLITS.exists() or not SPLIT_RULES.exists() or json.loads(SPLIT_RULES.read_text()) != rules:
        return None
    return load_table(SPLITS)


def _tell_of_given_leaks(manifest: pd.DataFrame, contents: pd.DataFrame, pairs: pd.DataFrame) -> None:
    copies = find_copies_across_splits(manifest)
    for row in copies.head(3).itertuples():
        log.warning("one content in several given splits, kept in the most held out alone: %s", row.path)
    leaks = find_leaks(contents, pairs, "given_split")
    paths = manifest.drop_duplicates("image_id").set_index("image_id")["path"]
    for row in leaks.head(3).itertuples():
        log.warning("near-duplicates across given splits: %s and %s", paths[str(row.first)], paths[str(row.second)])
    if len(copies) + len(leaks):
        log.warning("the given splits leak: %d copies, %d near-duplicate pairs", len(copies), len(leaks))


def _refuse_leaks(contents: pd.DataFrame, pairs: pd.DataFrame) -> None:
    """What we divide ourselves must not leak: a check of the result, whatever made it."""
    ours = contents[contents["given_split"].isna() | contents["given_split"].eq("train")]
    leaks = find_leaks(ours, pairs, "split")
    if len(leaks):
        raise DataError(
            f"{len(leaks)} pairs of near-duplicates or groups are in two splits, first {leaks['first'].iloc[0]} and "
            f"{leaks['second'].iloc[0]}: remove data/split and run again, so that all is divided anew"
        )
