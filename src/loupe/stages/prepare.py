"""Decode and resize every image once, into an array for each kind of model."""

import logging
from dataclasses import replace
from pathlib import Path

import pandas as pd

from loupe.config import Params, PrepareTask
from loupe.data.images import Geometry
from loupe.data.manifest import load_table
from loupe.data.prepare import (
    FEATURES,
    PIXELS,
    choose_classifier_geometry,
    choose_detector_geometry,
    prepare_images,
)
from loupe.data.split import Tasks, load_tasks
from loupe.models.classifiers import get_data_config
from loupe.models.input_size import check_input_size
from loupe.stages.entry import save_json
from loupe.stages.files import MANIFEST, PREPARED, SKIPPED, SPLITS, TASKS

log = logging.getLogger(__name__)


def prepare(params: Params) -> None:
    manifest = load_table(MANIFEST).sort_values("mask_path", kind="stable").drop_duplicates("image_id")  # masked first
    rows, tasks = manifest.merge(load_table(SPLITS), on="image_id"), load_tasks(TASKS)
    for task, reason in (("classifier", tasks.no_classifier_because), ("detector", tasks.no_detector_because)):
        if reason:
            save_json({"reason": reason}, PREPARED / task / SKIPPED)
            continue
        chosen = _choose_rows(rows, task, tasks)
        geometry = _choose_geometry(params, task, chosen)
        if task == "classifier":
            check_input_size(params.train_classifier.backbone, geometry.input_height, geometry.input_width, 3)
        prepare_images(Path(params.ingest.source), chosen, geometry, PREPARED / task)
        log.info(
            "%s: %d images kept as %d x %d x %d, seen by the model at %d x %d (%s)",
            task,
            len(chosen),
            geometry.height,
            geometry.width,
            geometry.channels,
            geometry.input_height,
            geometry.input_width,
            geometry.fit,
        )


def _choose_rows(rows: pd.DataFrame, task: str, tasks: Tasks) -> pd.DataFrame:
    """The detector sees normal images, and at test the anomalous ones too."""
    if task == "classifier":
        return rows[rows["label"].isin(tasks.labels)]
    return rows[rows["label"].eq(str(tasks.normal_label)) | rows["split"].eq("test")]


def _choose_geometry(params: Params, task: str, rows: pd.DataFrame) -> Geometry:
    section: PrepareTask = getattr(params.prepare, task)
    input_size = _read_size(section.input_size)
    fit = None if section.fit == "auto" else section.fit
    if task == "detector":
        canvas = PIXELS if params.train_detector.rebuilds_pixels else FEATURES
        canvas = replace(canvas, largest=canvas.largest * params.train_detector.tiles)
        return choose_detector_geometry(rows[rows["split"].eq("train")], canvas, input_size, fit)
    native = get_data_config(params.train_classifier.backbone)
    return choose_classifier_geometry(
        rows, input_size, fit, native.input_size, native.crop_fraction, native.interpolation
    )


def _read_size(value: int | list[int] | str) -> tuple[int, int] | None:
    """Height and width; None where `auto` stands."""
    if isinstance(value, str):
        return None
    return (value, value) if isinstance(value, int) else (value[0], value[1])
