"""Training an autoencoder on normal images alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional as F

from loupe.data.loading import Batch, PreparedDataset, build_loader
from loupe.models.detectors.autoencoder import Autoencoder
from loupe.models.files import WEIGHTS, load_weights
from loupe.training.trainer import History, Report, Schedule, build_one_cycle, choose_num_workers, fit


@dataclass(frozen=True)
class Reconstruction:
    """How to train. The learning rate is the peak of a one-cycle schedule."""

    schedule: Schedule
    batch_size: int
    learning_rate: float


class AutoencoderTraining(pl.LightningModule):
    """Mean squared error between image and reconstruction."""

    def __init__(self, autoencoder: Autoencoder, learning_rate: float) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.learning_rate = learning_rate

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        return self._compute_loss("train/loss", batch)

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        self._compute_loss("val/loss", batch)

    def _compute_loss(self, name: str, batch: Batch) -> Tensor:
        images, _ = batch
        targets, reconstructions = self.autoencoder(images)
        loss = F.mse_loss(reconstructions, targets)
        self.log(name, loss, on_step=False, on_epoch=True, batch_size=len(images), prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        return build_one_cycle(torch.optim.Adam(self.autoencoder.parameters(), self.learning_rate), self.trainer)


def train_autoencoder(
    autoencoder: Autoencoder,
    train: PreparedDataset,
    val: PreparedDataset,
    recipe: Reconstruction,
    folder: Path,
    report: Report,
) -> History:
    """Train, and leave the autoencoder with the weights of its best epoch.

    Args:
        folder: gets these and the last; what a stopped training left there is gone on from, so that it must belong to
            the same recipe and data.
    """
    history = History(autoencoder, folder, report)
    workers = choose_num_workers()
    fit(
        AutoencoderTraining(autoencoder, recipe.learning_rate),
        recipe.schedule,
        history,
        build_loader(train, recipe.batch_size, shuffle=True, num_workers=workers),
        build_loader(val, 4 * recipe.batch_size, shuffle=False, num_workers=workers),
        seed=train.seed,
    )
    load_weights(autoencoder, folder / WEIGHTS)
    return history
