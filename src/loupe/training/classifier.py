"""Training a classifier by a recipe: a head on frozen features, the whole network, or one after the other."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytorch_lightning as pl
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2

from loupe.data.loading import PreparedDataset, build_loader
from loupe.evaluation.calibration import compute_calibrated_loss
from loupe.models.classifiers import Classifier
from loupe.models.depthwise import FastDepthwise
from loupe.models.files import LAST, WEIGHTS, load_weights, save_weights
from loupe.models.optimization import build_optimizer, freeze_layers
from loupe.models.preprocess import Preprocess
from loupe.training.head import JUDGED_BY, FrozenFeatures
from loupe.training.trainer import (
    CHECKPOINT,
    History,
    Report,
    Schedule,
    build_cosine,
    build_one_cycle,
    choose_num_workers,
    fit,
)

REFIT, START = "refit", "start.safetensors"
NUM_AUGMENTED = 4  # augmented versions of each image whose features a head learns from
ENOUGH_FOR_START = 2_500  # images for a head that the whole network goes on from

log = logging.getLogger(__name__)

RecipeName = Literal["scratch", "scratch_augmented", "features", "features_augmented", "fine_tuned"]


class Steps(NamedTuple):
    """What a recipe does: a head on frozen features, the whole network, and whether images are augmented."""

    head: bool
    whole: bool
    augments: bool


RECIPES: dict[RecipeName, Steps] = {
    "scratch": Steps(head=False, whole=True, augments=False),
    "scratch_augmented": Steps(head=False, whole=True, augments=True),
    "features": Steps(head=True, whole=False, augments=False),
    "features_augmented": Steps(head=True, whole=False, augments=True),
    "fine_tuned": Steps(head=True, whole=True, augments=True),
}


@dataclass(frozen=True)
class Recipe:
    """How the whole network is trained. `learning_rate` is the head's, and the peak of its schedule.

    `epsilon` is what Adam and its kin add to the root of a mean squared gradient, None for their own 1e-8.
    `size` is the (height, width) in pixels of what it learns from; it may be used on larger images.
    `l1` is the weight of the sum of absolute weights in the loss; `mixup` and `cutmix` are the alphas of their beta
    distributions, 0 for never; `ema_decay` is of the moving average of the weights, which is then what is validated
    and kept, 0 for none. `frozen` is the share of the layers, from the image on, that stay as they were.
    `adapts_batch_norm` lets the running statistics of the others follow the new images. `refits` trains all epochs
    again once val has judged, on its images too (Goodfellow et al., Deep Learning, 2016, section 7.8).
    """

    steps: Steps
    schedule: Schedule
    size: tuple[int, int]
    batch_size: int
    optimizer: str
    learning_rate: float
    epsilon: float | None
    layer_decay: float
    frozen: float
    rate_schedule: Literal["one_cycle", "cosine", "plateau"]
    weight_decay: float
    l1: float
    label_smoothing: float
    mixup: float
    cutmix: float
    ema_decay: float
    balances_classes: bool
    adapts_batch_norm: bool
    refits: bool
    compiles: bool


class ClassifierTraining(pl.LightningModule):
    """Cross-entropy on labels that may be smoothed and mixed; validation on plain ones."""

    class_weights: Tensor

    def __init__(self, classifier: Classifier, recipe: Recipe, class_weights: Float[Tensor, " num_labels"]) -> None:
        super().__init__()
        self.classifier = classifier
        self.recipe = recipe
        self.register_buffer("class_weights", class_weights)
        config = classifier.config
        self.preprocess = Preprocess(
            config.crop, recipe.size, config.channels, config.mean, config.std, config.memory_format
        )
        self.mix = _build_mix(recipe, len(class_weights))
        average = get_ema_multi_avg_fn(recipe.ema_decay)
        self.averaged = AveragedModel(classifier, multi_avg_fn=average, use_buffers=True) if recipe.ema_decay else None
        self.val_outputs: list[tuple[Tensor, Tensor]] = []
        self.plateau: ReduceLROnPlateau | None = None
        self.stopped_plateau: dict[str, Any] | None = None

    @property
    def trained(self) -> Classifier:
        """The weights that are validated and kept."""
        if self.averaged is None:
            return self.classifier
        averaged: Classifier = self.averaged.module  # type: ignore[assignment]
        return averaged

    def on_train_epoch_start(self) -> None:
        """Of a few images, batch statistics are noise: the pretrained ones then serve better."""
        for module in self.classifier.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train(self.recipe.adapts_batch_norm and not _is_frozen(module))

    def training_step(self, batch: Sequence[Tensor], batch_index: int) -> Tensor:
        images, targets = batch
        inputs, targets = self.mix(self.preprocess(images), targets)
        with self._choose_convolutions():
            logits = self.classifier.backbone(inputs)
        loss = F.cross_entropy(logits, targets, self.class_weights, label_smoothing=self.recipe.label_smoothing)
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(images))
        if self.recipe.l1:
            loss = loss + self.recipe.l1 * sum(
                one.abs().sum() for one in self.classifier.parameters() if one.ndim > 1 and one.requires_grad
            )
        return loss

    def _choose_convolutions(self) -> AbstractContextManager[object]:
        """Those of torch on a GPU, or where they are compiled."""
        return FastDepthwise() if self.device.type == "cpu" and not self.recipe.compiles else nullcontext()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The optimizer has made a step after as many batches as it accumulates, and after the epoch's last."""
        has_stepped = (batch_idx + 1) % self.recipe.schedule.accumulate == 0 or self.trainer.is_last_batch
        if self.averaged is not None and has_stepped:
            self.averaged.update_parameters(self.classifier)

    def validation_step(self, batch: Sequence[Tensor], batch_index: int) -> None:
        images, targets = batch
        logits = self.trained(images).float()
        accuracy = (logits.argmax(dim=1) == targets).float().mean()
        self.log("val/loss", F.cross_entropy(logits, targets), batch_size=len(targets), prog_bar=True)
        self.log("val/accuracy", accuracy, batch_size=len(targets), prog_bar=True)
        self.val_outputs.append((logits.softmax(dim=1).cpu(), targets.cpu()))

    def on_validation_epoch_end(self) -> None:
        probabilities, targets = (torch.cat(parts).numpy() for parts in zip(*self.val_outputs, strict=True))
        self.val_outputs.clear()
        self.log(JUDGED_BY, compute_calibrated_loss(targets, probabilities), prog_bar=True)

    def on_train_epoch_end(self) -> None:
        """Lightning would step this schedule after the checkpoint, which would then lack the step."""
        if self.plateau is not None:
            self.plateau.step(self.trainer.callback_metrics[JUDGED_BY])

    def configure_optimizers(self) -> Any:
        recipe = self.recipe
        optimizer = build_optimizer(
            self.classifier.backbone,
            recipe.optimizer,
            recipe.learning_rate,
            recipe.weight_decay,
            recipe.layer_decay,
            recipe.epsilon,
        )
        if recipe.rate_schedule == "plateau":
            self.plateau = ReduceLROnPlateau(optimizer, patience=max(1, recipe.schedule.patience // 3))
            return optimizer
        return (build_cosine if recipe.rate_schedule == "cosine" else build_one_cycle)(optimizer, self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.plateau is not None:
            checkpoint["plateau"] = self.plateau.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.stopped_plateau = checkpoint.get("plateau")

    def on_train_start(self) -> None:
        """The schedule exists only now."""
        if self.plateau is not None and self.stopped_plateau is not None:
            self.plateau.load_state_dict(self.stopped_plateau)


def train_network(
    classifier: Classifier,
    train: PreparedDataset,
    val: PreparedDataset,
    recipe: Recipe,
    folder: Path,
    report: Report,
) -> History:
    """Train by the recipe's steps, and leave the classifier ready to predict, with the weights of its best epoch.

    Where `is_refitted`, it has those with which a second training ends.

    Args:
        folder: gets model.safetensors, the best, and last.safetensors; what a stopped training left there is gone on
            from, so that it must belong to the same recipe and data.
        report: told each epoch's metrics. A head on frozen features is epoch 0; names of a second training's begin
            with `refit/`.
    """
    train = train if recipe.steps.augments else train.without_augmentation()
    history = History(classifier, folder, report, JUDGED_BY)
    if not (folder / CHECKPOINT).exists():
        if recipe.steps.head:
            train_head(classifier, train, val, recipe, history)
        elif recipe.refits:
            save_weights(classifier.state_dict(), folder / START)
    if recipe.steps.whole:
        train_whole(classifier, train, val, recipe, history)
    history.check_finite(history.best_loss)
    if is_refitted(recipe, history):
        refit(classifier, train.join(val), recipe, history)
    else:
        load_weights(classifier, folder / WEIGHTS)
    classifier.eval()  # Lightning leaves it as it trains
    return history


def train_head(
    classifier: Classifier, train: PreparedDataset, val: PreparedDataset, recipe: Recipe, history: History
) -> None:
    """Epoch 0. What is kept, or refitted, has learnt from val too; what the whole network goes on from has not."""
    if recipe.steps.whole:
        versions = [train.draw(ENOUGH_FOR_START)]
    else:
        versions = [train.without_augmentation(), *[train] * (NUM_AUGMENTED if recipe.steps.augments else 0)]
    features = FrozenFeatures(classifier, versions, val)
    features.set_final_head()
    history.add(features.compute_metrics())
    if recipe.refits:
        save_weights(classifier.state_dict(), history.folder / START)
    features.set_head()


def is_refitted(recipe: Recipe, judged: History) -> bool:
    """Whether all epochs are trained again after val's judgement; if that is for the head alone, they are not."""
    return recipe.refits and recipe.steps.whole and not _is_head_best(recipe, judged)


def has_learnt_from_val(recipe: Recipe, judged: History) -> bool:
    """Whether val's images, once they have judged, are among those that the kept weights were fitted to."""
    return is_refitted(recipe, judged) or _is_head_best(recipe, judged)


def _is_head_best(recipe: Recipe, judged: History) -> bool:
    return recipe.steps.head and judged.best_epoch == 0


def refit(classifier: Classifier, images: PreparedDataset, recipe: Recipe, judged: History) -> None:
    """Train all weights again, from the kept head or from nothing, to the end of the schedule."""
    log.info("epoch %d is the best; all epochs again, on the images of val too", judged.best_epoch)
    folder = judged.folder / REFIT
    folder.mkdir(exist_ok=True)
    load_weights(classifier, judged.folder / START)
    history = History(classifier, folder, partial(_report_refit, judged.report), judged_by="train/loss")
    train_whole(classifier, images, None, recipe, history)
    history.check_finite(history.rows[-1][history.judged_by])
    load_weights(classifier, folder / LAST)


def _report_refit(report: Report, epoch: int, metrics: dict[str, float]) -> None:
    report(epoch, {f"{REFIT}/{name}": value for name, value in metrics.items()})


def train_whole(
    classifier: Classifier, train: PreparedDataset, val: PreparedDataset | None, recipe: Recipe, history: History
) -> None:
    """Train all weights; the history keeps the best and the last."""
    log.info("the whole network, %d epochs at most", recipe.schedule.epochs)
    freeze_layers(classifier.backbone, recipe.frozen)
    training = ClassifierTraining(classifier, recipe, _weigh_classes(train, classifier, recipe.balances_classes))
    history.network = training.trained
    if recipe.compiles:
        classifier.backbone.compile()
    workers = choose_num_workers()
    judging = None if val is None else build_loader(val, 4 * recipe.batch_size, shuffle=False, num_workers=workers)
    fit(
        training.train(),
        recipe.schedule,
        history,
        build_loader(train, recipe.batch_size, shuffle=True, num_workers=workers),
        judging,
        seed=train.seed,
    )
    classifier.requires_grad_(True)


def _is_frozen(layer: nn.Module) -> bool:
    """Whether it has weights, and none is trained."""
    weights = list(layer.parameters())
    return bool(weights) and not any(one.requires_grad for one in weights)


def _build_mix(recipe: Recipe, num_labels: int) -> Any:
    """Mixup and cutmix, one of them a batch where both are asked for."""
    mixes = [v2.MixUp(alpha=recipe.mixup, num_classes=num_labels)] if recipe.mixup else []
    mixes += [v2.CutMix(alpha=recipe.cutmix, num_classes=num_labels)] if recipe.cutmix else []
    return v2.RandomChoice(mixes) if mixes else lambda inputs, targets: (inputs, targets)


def _weigh_classes(train: PreparedDataset, classifier: Classifier, balances: bool) -> Float[Tensor, " num_labels"]:
    """One a class; where they are to be balanced, inversely as frequent as the class is, 1 on average."""
    num_labels = len(classifier.config.labels)
    if not balances:
        return torch.ones(num_labels)
    counts = torch.bincount(train.targets, minlength=num_labels).clamp(min=1)
    return len(train) / (num_labels * counts.float())
