"""Training a detector on normal images alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from loupe.data.loading import Batch, PreparedDataset, build_loader
from loupe.models.detectors.base import TrainedDetector
from loupe.models.files import WEIGHTS, load_weights
from loupe.training.trainer import History, Report, Schedule, build_one_cycle, choose_num_workers, fit


@dataclass(frozen=True)
class Reconstruction:
    """How to train. The learning rate is the peak of a one-cycle schedule."""

    schedule: Schedule
    batch_size: int
    learning_rate: float


class DetectorTraining(pl.LightningModule):
    """Lowers the detector's own loss."""

    def __init__(self, detector: TrainedDetector, learning_rate: float) -> None:
        super().__init__()
        self.detector = detector
        self.learning_rate = learning_rate

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        steps = self.trainer.estimated_stepping_batches
        return self._compute_loss("train", batch, self.trainer.global_step / steps)

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """What a detector draws is the same in each epoch, so that their losses can be compared."""
        torch.manual_seed(batch_index)
        self._compute_loss("val", batch, 1.0)

    def _compute_loss(self, split: str, batch: Batch, progress: float) -> Tensor:
        images, _ = batch
        losses = self.detector.compute_losses(images, progress)
        named = {f"{split}/{name}": value for name, value in losses.items()}
        self.log_dict(named, on_step=False, on_epoch=True, batch_size=len(images), prog_bar=True)
        return losses["loss"]

    def configure_optimizers(self) -> Any:
        weights = [parameter for parameter in self.detector.parameters() if parameter.requires_grad]
        return build_one_cycle(torch.optim.Adam(weights, self.learning_rate), self.trainer)


def train_detector(
    detector: TrainedDetector,
    train: PreparedDataset,
    val: PreparedDataset,
    recipe: Reconstruction,
    folder: Path,
    report: Report,
) -> History:
    """Train, and leave the detector with the weights of its best epoch.

    Args:
        folder: gets these and the last; what a stopped training left there is gone on from, so that it must belong to
            the same recipe and data.
    """
    detector.train()  # Lightning trains a network in the mode that it finds it in
    history = History(detector, folder, report)
    workers = choose_num_workers()
    fit(
        DetectorTraining(detector, recipe.learning_rate),
        recipe.schedule,
        history,
        build_loader(train, recipe.batch_size, shuffle=True, num_workers=workers),
        build_loader(val, 4 * recipe.batch_size, shuffle=False, num_workers=workers),
        seed=train.seed,
    )
    history.check_finite(history.best_loss)
    load_weights(detector, folder / WEIGHTS)
    return history
