"""Train the classifier by its recipe, and record it: a folder for DVC, a run and a logged model for MLflow."""

import logging
from dataclasses import asdict

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
from loupe.models.optimization import check_optimizer
from loupe.models.weights import describe_source
from loupe.stages.entry import run_stage, save_json
from loupe.stages.files import MODELS, PREPARED, SKIPPED, TASKS
from loupe.stages.recording import finish_recording, load_policy, open_memory, record_training
from loupe.tracking.runs import log_epoch
from loupe.training.classifier import RECIPES, Recipe, compute_targets, train_network
from loupe.training.trainer import Schedule, choose_batch_size, choose_epochs, choose_precision

# On two CPU cores the default backbone trains at about 0.9 million pixels a second: three minutes and a half.
BUDGET_PIXELS = 180e6
LEAST_EPOCHS, MOST_EPOCHS, MOST_EPOCHS_FROM_SCRATCH = 2, 12, 60
# Of fewer images, batch statistics are noise, large steps forget more than they learn, and weights are better averaged.
MANY_IMAGES = 2_000
SMALL_LEARNING_RATE, LARGE_LEARNING_RATE = 1e-4, 2e-3
AVERAGED_EPOCHS = 3
FOLDER = MODELS / "classifier"

log = logging.getLogger(__name__)


def train_classifier(params: Params) -> None:
    tasks, section = load_tasks(TASKS), params.train_classifier
    if tasks.no_classifier_because:
        save_json({"reason": tasks.no_classifier_because}, FOLDER / SKIPPED)
        return
    check_optimizer(section.optimizer)
    seed_everything(params.seed, workers=True, verbose=False)
    prepared, weights = load_prepared(PREPARED / "classifier"), _choose_weights(section)
    config = build_config(section, weights, prepared, tasks.labels)
    classifier = build_classifier(config, weights, drop_rate=section.drop_rate, drop_path=section.drop_path)
    recipe = choose_recipe(section, prepared)
    facts = {"config": asdict(config), "recipe": asdict(recipe), "weights": weights, "seed": params.seed}
    with record_training("classifier", params, recipe) as run_id, open_memory("classifier", facts) as memory:
        history = train_network(
            classifier,
            _build_dataset(prepared, "train", tasks.labels, params.seed),
            _build_dataset(prepared, "val", tasks.labels, params.seed),
            recipe,
            memory,
            log_epoch,
        )
        extra = {
            "geometry": prepared.geometry.to_json(),
            "best_epoch": history.best_epoch,
            "recipe": section.recipe,
            "weights": describe_source(section.backbone, weights),
        }
        save_classifier(classifier, extra, FOLDER)
        finish_recording("classifier", run_id, history)


def _choose_weights(section: Section) -> str:
    if section.weights != "auto":
        return section.weights
    return "none" if section.recipe.startswith("scratch") else "package"


def build_config(section: Section, weights: str, prepared: Prepared, labels: list[str]) -> ClassifierConfig:
    """What the network is made of, for images as they were prepared."""
    geometry = prepared.geometry
    channels = choose_channels(section.backbone, weights, geometry.channels)
    pretrained = get_data_config(section.backbone).fit_channels(channels)
    return ClassifierConfig(
        backbone=section.backbone,
        labels=labels,
        crop=(geometry.crop_height, geometry.crop_width),
        size=(geometry.input_height, geometry.input_width),
        mean=pretrained.mean,
        std=pretrained.std,
        channels=channels,
        channels_last=section.channels_last,
    )


def choose_recipe(section: Section, prepared: Prepared) -> Recipe:
    """What stands at `auto` follows from the number of images and their size."""
    num_images = len(prepared.rows_of("train"))
    height, width = prepared.geometry.input_height, prepared.geometry.input_width
    from_scratch = section.recipe.startswith("scratch")
    most_epochs = MOST_EPOCHS_FROM_SCRATCH if from_scratch else MOST_EPOCHS
    epochs = choose_epochs(num_images, height * width, BUDGET_PIXELS, LEAST_EPOCHS, most_epochs)
    batch_size = choose_batch_size(num_images) if section.batch_size == "auto" else section.batch_size
    is_many = num_images >= MANY_IMAGES or from_scratch
    learning_rate = LARGE_LEARNING_RATE if is_many else SMALL_LEARNING_RATE
    num_averaged = AVERAGED_EPOCHS * max(1, num_images // (batch_size * section.accumulate))
    ema_decay = 0.0 if is_many else 1 - 1 / num_averaged
    recipe = Recipe(
        steps=RECIPES[section.recipe],
        schedule=Schedule(
            epochs=epochs if section.epochs == "auto" else section.epochs,
            patience=section.patience,
            precision=choose_precision() if section.precision == "auto" else section.precision,
            accumulate=section.accumulate,
            gradient_clip=section.gradient_clip,
        ),
        batch_size=batch_size,
        learning_rate=learning_rate if section.learning_rate == "auto" else section.learning_rate,
        rate_schedule=section.schedule,
        ema_decay=ema_decay if section.ema_decay == "auto" else section.ema_decay,
        balances_classes=section.class_weights == "balanced",
        adapts_batch_norm=is_many,
        compiles=section.compile,
        **section.model_dump(
            include={"optimizer", "layer_decay", "weight_decay", "l1", "label_smoothing", "mixup", "cutmix"}
        ),
    )
    _tell(section, recipe, num_images, f"{height} x {width}")
    return recipe


def _tell(section: Section, recipe: Recipe, num_images: int, size: str) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    log.info("%s of %s on %s: %d images at %s", section.recipe, section.backbone, device, num_images, size)
    if recipe.steps.whole:
        log.info(
            "%d epochs at most, batches of %d, learning rate %g, batch norm %s, weights %s",
            recipe.schedule.epochs,
            recipe.batch_size,
            recipe.learning_rate,
            "adapts" if recipe.adapts_batch_norm else "keeps its statistics",
            f"averaged with a decay of {recipe.ema_decay:.3g}" if recipe.ema_decay else "as they are",
        )


def _build_dataset(prepared: Prepared, split: str, labels: list[str], seed: int) -> PreparedDataset:
    rows = prepared.rows_of(split)
    targets = compute_targets(prepared.index["label"].to_numpy()[rows], labels)
    augmentation = build_augmentation(load_policy("classifier")) if split == "train" else None
    return PreparedDataset(prepared.images, rows, targets, augmentation, seed)


if __name__ == "__main__":
    run_stage(train_classifier)
