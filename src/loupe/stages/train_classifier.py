"""Train the classifier by its recipe, and record it: a folder for DVC, a run and a logged model for MLflow."""

import logging
from dataclasses import asdict
from typing import TypeVar

import torch
from pytorch_lightning import seed_everything

from loupe.config import Auto, Params
from loupe.config import TrainClassifier as Section
from loupe.data.loading import PreparedDataset
from loupe.data.prepare import Prepared, load_prepared
from loupe.data.split import load_tasks
from loupe.data.transforms import build_augmentation
from loupe.errors import ConfigError
from loupe.models.classifiers import (
    ClassifierConfig,
    build_classifier,
    choose_channels,
    compute_targets,
    get_data_config,
    save_classifier,
)
from loupe.models.input_size import check_input_size
from loupe.models.optimization import check_optimizer
from loupe.models.weights import depends_on_size, describe_source
from loupe.stages.files import MODELS, PREPARED, TASKS
from loupe.stages.recording import finish_recording, load_policy, open_memory, record_training
from loupe.stages.reference import save_reference
from loupe.tracking.runs import log_epoch
from loupe.training.classifier import RECIPES, Recipe, has_learnt_from_val, is_refitted, train_network
from loupe.training.trainer import Schedule, choose_batch_size, choose_epochs, choose_precision

# On two CPU cores the default backbone trains at 0.6 to 1.3 million pixels a second: two to five minutes.
BUDGET_PIXELS = 180e6
LEAST_EPOCHS, MOST_EPOCHS, MOST_EPOCHS_FROM_SCRATCH = 2, 20, 60
# With half of its stages frozen it trains at 1.2 to 1.5 million, so that two trainings of few images take as long. That
# the second learns from val too raised accuracy from 0.82 to 0.82, 0.77 to 0.79, 0.79 to 0.86 and 0.71 to 0.80 (clothes
# and tiles, two draws each, of 24 images a class and 4 of val).
REFIT_BUDGET_PIXELS = 280e6
# From fewer images, small steps forget less of what was learnt before, and weights are averaged. Their batch statistics
# are noise. To mix them does harm: of 128 photos it raised log loss from 0.28 to 0.44, in cross-validation.
MANY_IMAGES = 2_000
SMALL_LEARNING_RATE, LARGE_LEARNING_RATE = 1e-4, 2e-3
# A head that fits the images almost wholly leaves hardly a gradient. Adam's steps are as large as its rate all the
# same, and wander off, unless its epsilon outweighs such gradients (log loss after 24 images of each of five clothes,
# the same run repeated: 0.31 and 0.39 with 1e-8; 0.24, 0.28 and 0.31 with this; 0.29 with the head alone).
EPSILON = 1e-5
AVERAGED_EPOCHS = 3
# The first stages see edges and textures, which serve any photo. Kept, they leave log loss about as it is when all are
# trained (of 24 images of each of five clothes, two draws: 0.56 and 0.61, all 0.59 and 0.61, the head alone 0.60 and
# 0.67), and a step takes less than half the time.
FROZEN = 0.5
# Random crops show things larger than whole images do: what is trained on them at 224 pixels is at its best on whole
# images at 256 (Touvron et al., arXiv:1906.06423). Against 288, it raised accuracy by 0.01 to 0.03 in five draws of
# clothes and tiles. Few images leave the time.
ENLARGEMENT = 8 / 7
FOLDER = MODELS / "classifier"

Value = TypeVar("Value")

log = logging.getLogger(__name__)


def train_classifier(params: Params) -> None:
    tasks, section = load_tasks(TASKS), params.train_classifier
    check_optimizer(section.optimizer)
    seed_everything(params.seed, workers=True, verbose=False)
    prepared, weights = load_prepared(PREPARED / "classifier"), _choose_weights(section)
    config = build_config(section, weights, prepared, tasks.labels)
    dropped = {name: _resolve(getattr(section, name), None) for name in ("drop_rate", "drop_path")}
    classifier = build_classifier(config, weights, **dropped)
    recipe = choose_recipe(section, prepared)
    source = describe_source(section.backbone, weights)
    facts = {"config": asdict(config), "recipe": asdict(recipe), "weights": source, "seed": params.seed, **dropped}
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
            "refitted": is_refitted(recipe, history),
            "learnt_from_val": has_learnt_from_val(recipe, history),
            "recipe": section.recipe,
            "weights": source,
        }
        save_classifier(classifier, extra, FOLDER)
        device = next(classifier.parameters()).device
        unseen = ("calibration", "test" if is_refitted(recipe, history) else "val")  # by what embeds
        save_reference(prepared, unseen, lambda images: (classifier.compute_features(images.to(device)), None), FOLDER)
        finish_recording("classifier", run_id, history.to_table())


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
        size=_choose_size(section, prepared),
        mean=pretrained.mean,
        std=pretrained.std,
        channels=channels,
        channels_last=section.channels_last,
    )


def _choose_size(section: Section, prepared: Prepared) -> tuple[int, int]:
    """What the trained network sees: of few photos more than it learns from, where its layers allow any size."""
    geometry = prepared.geometry
    size, crop = (geometry.input_height, geometry.input_width), (geometry.crop_height, geometry.crop_width)
    native = get_data_config(section.backbone).input_size
    if not _is_few(section, prepared) or depends_on_size(section.backbone) or not size == crop == (native, native):
        return size
    side = 32 * round(native * ENLARGEMENT / 32)
    try:
        check_input_size(section.backbone, side, side, geometry.channels)
    except ConfigError:
        return size
    return side, side


def _is_few(section: Section, prepared: Prepared) -> bool:
    """Whether a pretrained network has so few images that what it was taught before must be kept."""
    return len(prepared.rows_of("train")) < MANY_IMAGES and _choose_weights(section) != "none"


def choose_recipe(section: Section, prepared: Prepared) -> Recipe:
    """What stands at `auto` follows from the number of images and their size."""
    num_images = len(prepared.rows_of("train"))
    height, width = prepared.geometry.input_height, prepared.geometry.input_width
    from_scratch = section.recipe.startswith("scratch")
    most_epochs = MOST_EPOCHS_FROM_SCRATCH if from_scratch else MOST_EPOCHS
    batch_size = _resolve(section.batch_size, choose_batch_size(num_images))
    is_few = _is_few(section, prepared)
    epochs = _resolve(
        section.epochs, choose_epochs(num_images, height * width, BUDGET_PIXELS, LEAST_EPOCHS, most_epochs)
    )
    num_averaged = AVERAGED_EPOCHS * max(1, num_images // (batch_size * section.accumulate))
    recipe = Recipe(
        steps=RECIPES[section.recipe],
        schedule=Schedule(
            epochs=epochs,
            patience=section.patience,
            precision=_resolve(section.precision, choose_precision()),
            accumulate=section.accumulate,
            gradient_clip=section.gradient_clip,
        ),
        size=(height, width),
        batch_size=batch_size,
        learning_rate=_resolve(section.learning_rate, SMALL_LEARNING_RATE if is_few else LARGE_LEARNING_RATE),
        epsilon=EPSILON if is_few else None,
        rate_schedule=section.schedule,
        ema_decay=_resolve(section.ema_decay, 1 - 1 / num_averaged if is_few else 0.0),
        balances_classes=section.class_weights == "balanced",
        frozen=_resolve(section.frozen, FROZEN if is_few else 0.0),
        adapts_batch_norm=not is_few,
        refits=_resolve(section.refit, is_few and _can_refit(section, prepared, epochs)),
        compiles=section.compile,
        **section.model_dump(
            include={"optimizer", "layer_decay", "weight_decay", "l1", "label_smoothing", "mixup", "cutmix"}
        ),
    )
    used_at = " x ".join(map(str, _choose_size(section, prepared)))
    _tell(section, recipe, num_images, f"{height} x {width}, used at {used_at}")
    return recipe


def _can_refit(section: Section, prepared: Prepared, epochs: int) -> bool:
    """Whether a second training needs no val, and there is time for it."""
    geometry = prepared.geometry
    num_images = 2 * len(prepared.rows_of("train")) + len(prepared.rows_of("val"))
    possible = choose_epochs(num_images, geometry.input_height * geometry.input_width, REFIT_BUDGET_PIXELS, 0, epochs)
    return RECIPES[section.recipe].whole and section.schedule != "plateau" and possible == epochs


def _resolve(value: Value | Auto, chosen: Value) -> Value:
    """What was chosen, where the params leave it open."""
    return chosen if value == "auto" else value


def _tell(section: Section, recipe: Recipe, num_images: int, size: str) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    log.info("%s of %s on %s: %d images at %s", section.recipe, section.backbone, device, num_images, size)
    if recipe.steps.whole:
        log.info(
            "%d epochs at most, batches of %d, learning rate %g, mixup %g, cutmix %g, %.0f%% of the layers frozen, "
            "batch norm %s, weights %s%s",
            recipe.schedule.epochs,
            recipe.batch_size,
            recipe.learning_rate,
            recipe.mixup,
            recipe.cutmix,
            100 * recipe.frozen,
            "adapts" if recipe.adapts_batch_norm else "keeps its statistics",
            f"averaged with a decay of {recipe.ema_decay:.3g}" if recipe.ema_decay else "as they are",
            ", then again with val" if recipe.refits else "",
        )


def _build_dataset(prepared: Prepared, split: str, labels: list[str], seed: int) -> PreparedDataset:
    rows = prepared.rows_of(split)
    targets = compute_targets(prepared.index["label"].to_numpy()[rows], labels)
    augmentation = build_augmentation(load_policy("classifier")) if split == "train" else None
    return PreparedDataset(prepared.images, rows, targets, augmentation, seed)
