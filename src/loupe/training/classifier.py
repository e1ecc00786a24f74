"""Fine-tuning a pretrained classifier: the new head on the frozen backbone, then the whole at a smaller rate."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from loupe.data.loading import Batch, PreparedDataset, build_loader
from loupe.models.classifiers import Classifier
from loupe.models.files import WEIGHTS, load_weights
from loupe.training.trainer import History, Report, build_one_cycle, build_trainer, choose_num_workers

HEAD_BATCH_SIZE = 64

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FineTuning:
    """How to train. Learning rates are peaks of one-cycle schedules; `patience` counts epochs without progress.

    `adapts_batch_norm` lets the running statistics of batch normalisation follow the new images in the second phase.
    """

    head_epochs: int
    head_learning_rate: float
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    label_smoothing: float
    patience: int
    adapts_batch_norm: bool


class ClassifierTraining(pl.LightningModule):
    """Cross-entropy with label smoothing; validation without. A batch is inputs (images, or features) and targets."""

    def __init__(
        self,
        network: nn.Module,
        learning_rate: float,
        weight_decay: float,
        label_smoothing: float,
        adapts_batch_norm: bool = True,
    ) -> None:
        super().__init__()
        self.adapts_batch_norm = adapts_batch_norm
        self.network = network
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.label_smoothing = label_smoothing

    def on_train_epoch_start(self) -> None:
        """Of a few images, batch statistics are noise: the pretrained ones then serve better."""
        if not self.adapts_batch_norm:
            for module in self.network.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def training_step(self, batch: Sequence[Tensor], batch_index: int) -> Tensor:
        inputs, targets = batch
        loss = F.cross_entropy(self.network(inputs), targets, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(targets))
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_index: int) -> None:
        inputs, targets = batch
        logits = self.network(inputs)
        accuracy = (logits.argmax(dim=1) == targets).float().mean()
        self.log("val/loss", F.cross_entropy(logits, targets), batch_size=len(targets), prog_bar=True)
        self.log("val/accuracy", accuracy, batch_size=len(targets), prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.network.parameters(), self.learning_rate, weight_decay=self.weight_decay)
        return build_one_cycle(optimizer, self.trainer)


def fine_tune(
    classifier: Classifier,
    train: PreparedDataset,
    val: PreparedDataset,
    recipe: FineTuning,
    folder: Path,
    report: Report,
) -> History:
    """Train in two phases, and leave the classifier with the weights of its best epoch.

    Args:
        folder: gets model.safetensors, the best, and last.safetensors.
        report: told each epoch's metrics; epochs of the second phase count on from the first.
    """
    history = History(classifier, folder, report)
    workers = choose_num_workers()
    log.info("phase 1: the head alone, on features of the frozen backbone")
    loaders = [
        build_loader(_without_augmentation(dataset), 4 * recipe.batch_size, shuffle=False, num_workers=workers)
        for dataset in (train, val)
    ]
    head_train, head_val = (_compute_features(classifier, loader) for loader in loaders)
    head_recipe = ClassifierTraining(
        classifier.head, recipe.head_learning_rate, recipe.weight_decay, recipe.label_smoothing
    )
    build_trainer(recipe.head_epochs, recipe.patience, history).fit(
        head_recipe,
        DataLoader(head_train, HEAD_BATCH_SIZE, shuffle=True, generator=torch.Generator().manual_seed(train.seed)),
        DataLoader(head_val, len(head_val)),
    )
    load_weights(classifier, folder / WEIGHTS)
    if recipe.epochs:
        log.info("phase 2: the whole network, %d epochs at most", recipe.epochs)
        whole = ClassifierTraining(
            classifier,
            recipe.learning_rate,
            recipe.weight_decay,
            recipe.label_smoothing,
            recipe.adapts_batch_norm,
        )
        build_trainer(recipe.epochs, recipe.patience, history).fit(
            whole,
            build_loader(train, recipe.batch_size, shuffle=True, num_workers=workers),
            build_loader(val, 4 * recipe.batch_size, shuffle=False, num_workers=workers),
        )
        load_weights(classifier, folder / WEIGHTS)
    return history


def _without_augmentation(dataset: PreparedDataset) -> PreparedDataset:
    return PreparedDataset(dataset.images, dataset.rows, dataset.targets.numpy(), None, dataset.seed)


@torch.inference_mode()
def _compute_features(classifier: Classifier, loader: DataLoader[Batch]) -> TensorDataset:
    """What the head sees of each image, once; the backbone is frozen, so that it can't change."""
    classifier.eval()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classifier.to(device)
    features: list[Float[Tensor, "batch num_features"]] = []
    targets: list[Int64[Tensor, " batch"]] = []
    for images, batch_targets in loader:
        features.append(classifier.compute_features(images.to(device)).float().cpu())
        targets.append(batch_targets)
    classifier.train()
    return TensorDataset(torch.cat(features).clone(), torch.cat(targets))


def compute_targets(labels: np.ndarray, classes: list[str]) -> Int64[np.ndarray, " num_images"]:
    """The position of each label in `classes`."""
    positions = {label: position for position, label in enumerate(classes)}
    return np.array([positions[label] for label in labels], dtype=np.int64)
