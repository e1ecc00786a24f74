"""Fit the detector to normal images, set its threshold from normal calibration images, and record it."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import seed_everything
from torch import Tensor

from loupe.config import Params
from loupe.config import TrainDetector as Section
from loupe.data.loading import PreparedDataset, build_loader
from loupe.data.manifest import save_table
from loupe.data.prepare import FEATURES, PIXELS, Prepared, load_prepared
from loupe.data.split import load_tasks
from loupe.data.transforms import build_augmentation
from loupe.evaluation.thresholds import (
    USUAL_RATE,
    check_false_alarm_rate,
    choose_false_alarm_rate,
    choose_rate_by_cost,
    describe_lowest_rate,
    explain_threshold,
)
from loupe.models.classifiers import get_data_config
from loupe.models.detectors.base import (
    Detector,
    FeatureDetector,
    TrainedDetector,
    check_num_images,
    compute_scores,
    detect,
    fit_detector,
    save_detector,
)
from loupe.models.detectors.family import FAMILY, build_detector
from loupe.models.detectors.features import FeatureConfig
from loupe.models.detectors.tiling import TiledDetector, TiledImages, TilingConfig, choose_tiles
from loupe.models.weights import describe_source
from loupe.stages.files import CALIBRATION, MODELS, PREPARED, TASKS
from loupe.stages.recording import finish_recording, load_policy, open_memory, record_training
from loupe.stages.reference import save_reference
from loupe.tracking.runs import log_epoch
from loupe.training.detector import Reconstruction
from loupe.training.detector import train_detector as train
from loupe.training.trainer import Schedule, choose_batch_size, choose_epochs, choose_num_workers, choose_precision

BUDGET_PIXELS = 100e6  # under a minute on two CPU cores
LEAST_EPOCHS, MOST_EPOCHS = 30, 60
FITTED_AT_ONCE = 16  # images
MOST_MAPS = 64
FOLDER = MODELS / "detector"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClosedForm:
    """How a detector without epochs is fitted: so much of the features may be kept in memory."""

    feature_bytes: int


@dataclass(frozen=True)
class Fitted:
    """What a fit left beside the detector: a row an epoch, and which of them was kept."""

    history: pd.DataFrame
    best_epoch: int


def train_detector(params: Params) -> None:
    tasks, section = load_tasks(TASKS), params.train_detector
    seed_everything(params.seed, workers=True, verbose=False)
    prepared = load_prepared(PREPARED / "detector")
    config = build_config(section, prepared)
    name = TiledDetector.name if isinstance(config, TilingConfig) else section.model
    detector = build_detector(name, config, section.weights)
    check_num_images(detector, len(prepared.rows_of("train")))
    rate = choose_rate(section, len(prepared.rows_of("calibration")))
    recipe = choose_recipe(section, prepared)
    with record_training("detector", params, recipe) as run_id, _open_memory(detector, recipe, params) as memory:
        fitted = _fit(detector, recipe, prepared, params.seed, memory)
        extra = {
            "geometry": prepared.geometry.to_json(),
            "best_epoch": fitted.best_epoch,
            "normal_label": tasks.normal_label,
            "weights": _describe_weights(section),
            **_calibrate(detector, prepared, rate),
        }
        save_detector(detector, extra, FOLDER)
        save_reference(prepared, ("calibration", "val"), lambda images: _embed(detector, images), FOLDER)
        finish_recording("detector", run_id, fitted.history)


def build_config(section: Section, prepared: Prepared) -> Any:
    """The config of a detector, as its `config_type` wants it; of tiles, if there is more than one."""
    geometry = prepared.geometry
    crop, size = (geometry.crop_height, geometry.crop_width), (geometry.input_height, geometry.input_width)
    if section.tiles == 1:
        return _build_inner_config(section, geometry.channels, crop, size)
    tile, rows, columns = choose_tiles(crop, section.tiles, section.tile_overlap)
    multiple = (PIXELS if section.rebuilds_pixels else FEATURES).multiple
    height, width = (
        max(1, round(length * whole / part / multiple)) * multiple
        for length, whole, part in zip(tile, size, crop, strict=True)
    )
    log.info("%d x %d tiles of %d x %d pixels, seen at %d x %d", rows, columns, *tile, height, width)
    inner = _build_inner_config(section, geometry.channels, tile, (height, width))
    return TilingConfig(section.model, inner, rows, columns)


def _build_inner_config(section: Section, channels: int, crop: tuple[int, int], size: tuple[int, int]) -> Any:
    kind = FAMILY[section.model].config_type
    if kind is FeatureConfig:
        native = get_data_config(section.backbone)
        return FeatureConfig(section.backbone, crop, size, tuple(native.mean), tuple(native.std))
    knobs = section.autoencoder
    others: dict[str, Any] = {
        "denoising_autoencoder": section.denoising.model_dump(),
        "vae": section.vae.model_dump(),
    }
    return kind(
        channels=channels,
        width=knobs.width,
        latent_channels=knobs.latent_channels,
        crop=crop,
        size=size,
        loss=knobs.loss,
        **others.get(section.model, {}),
    )


def choose_recipe(section: Section, prepared: Prepared) -> Reconstruction | ClosedForm:
    """How the detector is fitted, with everything that stood at `auto` decided."""
    num_images, geometry = len(prepared.rows_of("train")), prepared.geometry
    log.info("%s: %d normal images at %d x %d", section.model, num_images, geometry.input_height, geometry.input_width)
    if section.is_closed_form:
        return ClosedForm(int(section.feature_gigabytes * 1e9))
    knobs, pixels = section.autoencoder, geometry.input_height * geometry.input_width
    epochs = choose_epochs(num_images, pixels, BUDGET_PIXELS, LEAST_EPOCHS, MOST_EPOCHS)
    recipe = Reconstruction(
        schedule=Schedule(
            epochs=epochs if knobs.epochs == "auto" else knobs.epochs,
            patience=knobs.patience,
            precision=choose_precision(),
        ),
        batch_size=choose_batch_size(num_images) if knobs.batch_size == "auto" else knobs.batch_size,
        learning_rate=knobs.learning_rate,
    )
    log.info("%d epochs at most, batches of %d", recipe.schedule.epochs, recipe.batch_size)
    return recipe


def _open_memory(
    detector: Detector, recipe: Reconstruction | ClosedForm, params: Params
) -> AbstractContextManager[Path | None]:
    """Of a training in epochs, which may be stopped."""
    if isinstance(recipe, ClosedForm):
        return nullcontext()
    facts = {"detector": detector.name, "config": asdict(detector.config), "recipe": asdict(recipe)}
    return open_memory("detector", {**facts, "seed": params.seed, "weights": _describe_weights(params.train_detector)})


def _describe_weights(section: Section) -> str | None:
    """Where the backbone's are from; None for what has no backbone."""
    return None if section.rebuilds_pixels else describe_source(section.backbone, section.weights)


def _fit(
    detector: Detector, recipe: Reconstruction | ClosedForm, prepared: Prepared, seed: int, memory: Path | None
) -> Fitted:
    """Leaves the detector fitted, on the GPU where there is one; `memory` is where what trains in epochs keeps them."""
    dataset = _build_dataset(prepared, "train", seed)
    detector.to("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(recipe, ClosedForm):
        inner, images = (
            (detector.inner, TiledImages(detector, _Images(dataset)))
            if isinstance(detector, TiledDetector)
            else (detector, _Images(dataset))
        )
        assert isinstance(inner, FeatureDetector)
        fit_detector(inner, images, seed, recipe.feature_bytes)
        return _measure(detector, prepared)
    assert isinstance(detector, TrainedDetector)
    assert memory is not None  # _open_memory gives one to all that trains
    history = train(detector, dataset, _build_dataset(prepared, "val", seed), recipe, memory, log_epoch)
    return Fitted(history.to_table(), history.best_epoch)


def _build_dataset(prepared: Prepared, split: str, seed: int) -> PreparedDataset:
    rows = prepared.rows_of(split)
    augmentation = build_augmentation(load_policy("detector")) if split == "train" else None
    return PreparedDataset(prepared.images, rows, np.zeros(len(rows), np.int64), augmentation, seed)


class _Images:
    """The images of a data set in batches, as often as they are asked for, and the same each time."""

    def __init__(self, dataset: PreparedDataset) -> None:
        self.loader = build_loader(dataset, FITTED_AT_ONCE, shuffle=False, num_workers=choose_num_workers())

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Tensor]:
        return (images for images, _ in self.loader)


def _measure(detector: Detector, prepared: Prepared) -> Fitted:
    """A fit without epochs is one: its losses are the mean scores of images that it was fitted to, and of others."""
    val, train_rows = prepared.rows_of("val"), prepared.rows_of("train")
    losses = {
        "train/loss": _score(detector, prepared, train_rows[: len(val)]).mean(),
        "val/loss": _score(detector, prepared, val).mean(),
    }
    log_epoch(0, losses)
    return Fitted(pd.DataFrame([{"epoch": 0, **losses}]), best_epoch=0)


def _score(detector: Detector, prepared: Prepared, rows: np.ndarray) -> np.ndarray:
    """Raw anomaly scores of prepared images."""
    batches = prepared.read_batches(rows)
    return compute_scores(detector.eval(), map(torch.from_numpy, batches)).numpy().astype(np.float64)


def _calibrate(detector: Detector, prepared: Prepared, rate: float) -> dict[str, Any]:
    """Threshold and rate; the scores that they came from are kept, so that another rate needs no training."""
    rows = prepared.rows_of("calibration")
    scores = _score(detector, prepared, rows)
    save_table(
        pd.DataFrame({"image_id": prepared.index["image_id"].to_numpy()[rows], "anomaly_score": scores}),
        FOLDER / CALIBRATION,
    )
    threshold = explain_threshold(scores, rate)
    log.info("threshold %.6g: %s", threshold.value, threshold.describe())
    return {
        "threshold": threshold.value,
        "false_alarm_rate": threshold.asked_rate,
        "map_scale": _choose_map_scale(detector, prepared, rows),
    }


def _choose_map_scale(detector: Detector, prepared: Prepared, rows: np.ndarray) -> dict[str, float]:
    """For pictures of maps alone: from the middle of normal images' values to twice as far as their highest."""
    images = next(prepared.read_batches(rows, MOST_MAPS))
    _, maps = detect(detector, torch.from_numpy(images))
    low, top = float(maps.median()), float(maps.max())
    return {"low": low, "high": low + 2 * (top - low) if top > low else low + 1}


def _embed(detector: Detector, images: Tensor) -> tuple[Tensor, Tensor]:
    images = images.to(detector.device)
    return detector.embed(images), detector(images)[0]


def choose_rate(section: Section, num_calibration: int) -> float:
    """The rate of false alarms that the threshold is set for.

    Raises:
        ConfigError: if so few calibration images can't promise the rate that was asked for.
    """
    if section.false_alarm_rate == "auto":
        rate = choose_false_alarm_rate(num_calibration)
        if rate > USUAL_RATE:
            log.warning("a rate of %g can't be promised: %s", USUAL_RATE, describe_lowest_rate(num_calibration))
        return rate
    if section.false_alarm_rate == "by_cost":
        rate = choose_rate_by_cost(*section.costs.model_dump().values())
    else:
        rate = section.false_alarm_rate
    check_false_alarm_rate(rate, num_calibration)
    return rate
