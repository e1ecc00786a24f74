"""Divide the images into train, val, calibration and test, and decide what can be trained."""

import logging

from loupe.config import Params
from loupe.data.manifest import load_table, save_table
from loupe.data.split import SPLITS as SPLIT_NAMES
from loupe.data.split import Fractions, assign_splits, compute_tasks, find_leaks
from loupe.stages.entry import run_stage, save_json
from loupe.stages.files import MANIFEST, SPLITS, TASKS

log = logging.getLogger(__name__)


def split(params: Params) -> None:
    section = params.split
    manifest = load_table(MANIFEST)
    leaks = find_leaks(manifest)
    if len(leaks):
        log.warning(
            "%d contents are in several given splits, and stay in the most held out alone, first: %s",
            len(leaks),
            leaks["path"].iloc[0],
        )
    fractions = Fractions(section.val_fraction, section.calibration_fraction, section.test_fraction)
    splits = assign_splits(manifest, fractions, params.seed)
    tasks = compute_tasks(manifest, splits, section.normal_labels)
    save_table(splits, SPLITS)
    save_json(tasks.to_json(), TASKS)
    sizes = splits["split"].value_counts()
    log.info("images: %s", ", ".join(f"{name} {sizes.get(name, 0)}" for name in SPLIT_NAMES))
    log.info("classifier: %s", tasks.no_classifier_because or f"{len(tasks.labels)} classes")
    log.info("detector: %s", tasks.no_detector_because or f"normal is {tasks.normal_label!r}")


if __name__ == "__main__":
    run_stage(split)
