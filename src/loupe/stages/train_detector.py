"""Train the autoencoder on normal images, set its threshold from normal calibration images, and record it."""

import logging
from dataclasses import asdict

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import seed_everything

from loupe.config import Params
from loupe.config import TrainDetector as Section
from loupe.data.loading import PreparedDataset
from loupe.data.manifest import save_table
from loupe.data.prepare import Prepared, load_prepared
from loupe.data.split import load_tasks
from loupe.data.transforms import build_augmentation
from loupe.evaluation.thresholds import compute_threshold
from loupe.models.detectors.autoencoder import Autoencoder, AutoencoderConfig, compute_scores, save_autoencoder
from loupe.stages.entry import run_stage, save_json
from loupe.stages.files import MODELS, PREPARED, SKIPPED, TASKS
from loupe.stages.recording import finish_recording, load_policy, open_memory, record_training
from loupe.tracking.runs import log_epoch
from loupe.training.detector import Reconstruction, train_autoencoder
from loupe.training.trainer import Schedule, choose_batch_size, choose_epochs, choose_precision

BUDGET_PIXELS = 100e6  # under a minute on two CPU cores
LEAST_EPOCHS, MOST_EPOCHS = 30, 60
FOLDER = MODELS / "detector"

log = logging.getLogger(__name__)


def train_detector(params: Params) -> None:
    tasks, section = load_tasks(TASKS), params.train_detector
    if tasks.no_detector_because:
        save_json({"reason": tasks.no_detector_because}, FOLDER / SKIPPED)
        return
    seed_everything(params.seed, workers=True, verbose=False)
    prepared = load_prepared(PREPARED / "detector")
    config = _build_config(section, prepared)
    autoencoder, recipe = Autoencoder(config), _choose_recipe(section, prepared)
    facts = {"config": asdict(config), "recipe": asdict(recipe), "seed": params.seed}
    with record_training("detector", params, recipe) as run_id, open_memory("detector", facts) as memory:
        history = train_autoencoder(
            autoencoder,
            _build_dataset(prepared, "train", params.seed),
            _build_dataset(prepared, "val", params.seed),
            recipe,
            memory,
            log_epoch,
        )
        threshold = _calibrate(autoencoder, prepared, section.false_alarm_rate)
        extra = {
            "geometry": prepared.geometry.to_json(),
            "best_epoch": history.best_epoch,
            "threshold": threshold,
            "normal_label": tasks.normal_label,
            "false_alarm_rate": section.false_alarm_rate,
        }
        save_autoencoder(autoencoder, extra, FOLDER)
        finish_recording("detector", run_id, history)


def _build_config(section: Section, prepared: Prepared) -> AutoencoderConfig:
    geometry = prepared.geometry
    return AutoencoderConfig(
        channels=geometry.channels,
        width=section.width,
        latent_channels=section.latent_channels,
        crop=(geometry.crop_height, geometry.crop_width),
        size=(geometry.input_height, geometry.input_width),
    )


def _choose_recipe(section: Section, prepared: Prepared) -> Reconstruction:
    num_images = len(prepared.rows_of("train"))
    pixels = prepared.geometry.input_height * prepared.geometry.input_width
    epochs = choose_epochs(num_images, pixels, BUDGET_PIXELS, LEAST_EPOCHS, MOST_EPOCHS)
    recipe = Reconstruction(
        schedule=Schedule(
            epochs=epochs if section.epochs == "auto" else section.epochs,
            patience=section.patience,
            precision=choose_precision(),
        ),
        batch_size=choose_batch_size(num_images) if section.batch_size == "auto" else section.batch_size,
        learning_rate=section.learning_rate,
    )
    log.info(
        "autoencoder: %d normal images at %d x %d, %d epochs at most, batches of %d",
        num_images,
        prepared.geometry.input_height,
        prepared.geometry.input_width,
        recipe.schedule.epochs,
        recipe.batch_size,
    )
    return recipe


def _build_dataset(prepared: Prepared, split: str, seed: int) -> PreparedDataset:
    rows = prepared.rows_of(split)
    augmentation = build_augmentation(load_policy("detector")) if split == "train" else None
    return PreparedDataset(prepared.images, rows, np.zeros(len(rows), np.int64), augmentation, seed)


def _calibrate(autoencoder: Autoencoder, prepared: Prepared, false_alarm_rate: float) -> float:
    """The threshold; the scores that it came from are kept, so that another rate needs no training."""
    rows = prepared.rows_of("calibration")
    images = torch.from_numpy(prepared.images[rows]).permute(0, 3, 1, 2)
    scores = compute_scores(autoencoder.eval(), images).numpy().astype(np.float64)
    save_table(
        pd.DataFrame({"image_id": prepared.index["image_id"].to_numpy()[rows], "anomaly_score": scores}),
        FOLDER / "calibration_scores.parquet",
    )
    threshold = compute_threshold(scores, false_alarm_rate)
    log.info(
        "threshold %.6g: at most %.3g of normal images should pass it, by %d calibration images",
        threshold,
        max(false_alarm_rate, 1 / (len(scores) + 1)),
        len(scores),
    )
    return threshold


if __name__ == "__main__":
    run_stage(train_detector)
