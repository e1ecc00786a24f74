"""Fine-tune the classifier, and record it: a folder for DVC, a run and a logged model for MLflow."""

import logging

import torch
from pytorch_lightning import seed_everything

from loupe.config import Params
from loupe.config import TrainClassifier as Section
from loupe.data.loading import PreparedDataset
from loupe.data.prepare import Prepared, load_prepared
from loupe.data.split import load_tasks
from loupe.data.transforms import build_augmentation
from loupe.models.classifiers import (
    ClassifierConfig,
    build_classifier,
    choose_channels,
    get_data_config,
    save_classifier,
)
from loupe.models.weights import describe_source
from loupe.stages.entry import run_stage, save_json
from loupe.stages.files import MODELS, PREPARED, SKIPPED, TASKS
from loupe.stages.recording import finish_recording, load_policy, record_training
from loupe.tracking.runs import log_epoch
from loupe.training.classifier import FineTuning, compute_targets, fine_tune
from loupe.training.trainer import choose_batch_size, choose_epochs

# On two CPU cores the default backbone trains at about 0.9 million pixels a second: three minutes and a half.
BUDGET_PIXELS = 180e6
LEAST_EPOCHS, MOST_EPOCHS = 2, 20
# Of fewer images, batch statistics are noise and large steps forget more than they learn.
MANY_IMAGES = 2_000
SMALL_LEARNING_RATE, LARGE_LEARNING_RATE = 3e-4, 2e-3
FOLDER = MODELS / "classifier"

log = logging.getLogger(__name__)


def train_classifier(params: Params) -> None:
    tasks, section = load_tasks(TASKS), params.train_classifier
    if tasks.no_classifier_because:
        save_json({"reason": tasks.no_classifier_because}, FOLDER / SKIPPED)
        return
    seed_everything(params.seed, workers=True, verbose=False)
    prepared = load_prepared(PREPARED / "classifier")
    classifier = build_classifier(_build_config(section, prepared, tasks.labels), section.weights)
    recipe = _choose_recipe(section, prepared)
    with record_training("classifier", params, recipe) as run_id:
        history = fine_tune(
            classifier,
            _build_dataset(prepared, "train", tasks.labels, params.seed),
            _build_dataset(prepared, "val", tasks.labels, params.seed),
            recipe,
            FOLDER,
            log_epoch,
        )
        extra = {
            "geometry": prepared.geometry.to_json(),
            "best_epoch": history.best_epoch,
            "weights": describe_source(section.backbone, section.weights),
        }
        save_classifier(classifier, extra, FOLDER)
        finish_recording("classifier", run_id, history)


def _build_config(section: Section, prepared: Prepared, labels: list[str]) -> ClassifierConfig:
    geometry = prepared.geometry
    channels = choose_channels(section.backbone, section.weights, geometry.channels)
    pretrained = get_data_config(section.backbone).fit_channels(channels)
    return ClassifierConfig(
        backbone=section.backbone,
        labels=labels,
        crop=(geometry.crop_height, geometry.crop_width),
        size=(geometry.input_height, geometry.input_width),
        mean=pretrained.mean,
        std=pretrained.std,
        channels=channels,
    )


def _choose_recipe(section: Section, prepared: Prepared) -> FineTuning:
    num_images = len(prepared.rows_of("train"))
    height, width = prepared.geometry.input_height, prepared.geometry.input_width
    epochs = choose_epochs(num_images, height * width, BUDGET_PIXELS, LEAST_EPOCHS, MOST_EPOCHS)
    learning_rate = LARGE_LEARNING_RATE if num_images >= MANY_IMAGES else SMALL_LEARNING_RATE
    recipe = FineTuning(
        head_epochs=section.head_epochs,
        head_learning_rate=section.head_learning_rate,
        epochs=epochs if section.epochs == "auto" else section.epochs,
        batch_size=choose_batch_size(num_images) if section.batch_size == "auto" else section.batch_size,
        learning_rate=learning_rate if section.learning_rate == "auto" else section.learning_rate,
        weight_decay=section.weight_decay,
        label_smoothing=section.label_smoothing,
        patience=section.patience,
        adapts_batch_norm=num_images >= MANY_IMAGES,
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    log.info("%s on %s: %d images at %d x %d", section.backbone, device, num_images, height, width)
    log.info(
        "%d epochs of the head, %d of the whole, batches of %d, learning rate %g, batch norm %s",
        recipe.head_epochs,
        recipe.epochs,
        recipe.batch_size,
        recipe.learning_rate,
        "adapts" if recipe.adapts_batch_norm else "keeps its statistics",
    )
    return recipe


def _build_dataset(prepared: Prepared, split: str, labels: list[str], seed: int) -> PreparedDataset:
    rows = prepared.rows_of(split)
    targets = compute_targets(prepared.index["label"].to_numpy()[rows], labels)
    augmentation = build_augmentation(load_policy("classifier")) if split == "train" else None
    return PreparedDataset(prepared.images, rows, targets, augmentation, seed)


if __name__ == "__main__":
    run_stage(train_classifier)
