"""The trainer that both kinds of model share: precision, early stopping, best and last weights, history."""

import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping
from torch import nn

from loupe.models.files import WEIGHTS, save_weights

Report = Callable[[int, dict[str, float]], None]  # the epoch, from 0, and its metrics
LAST = "last.safetensors"

log = logging.getLogger(__name__)


class History(Callback):
    """Keeps each epoch's metrics, tells them to the log and to `report`, and keeps the best and the last weights.

    The best epoch is the one with the lowest `val/loss`. One history may follow several trainings of one network.
    """

    def __init__(self, network: nn.Module, folder: Path, report: Report) -> None:
        self.network = network
        self.folder = folder
        self.report = report
        self.rows: list[dict[str, float]] = []
        self.best_loss = math.inf
        self.best_epoch = 0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation has run by now, so that both kinds of metrics are there."""
        epoch = len(self.rows)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        metrics["learning_rate"] = trainer.optimizers[0].param_groups[-1]["lr"]
        self.rows.append({"epoch": epoch, **metrics})
        self.report(epoch, metrics)
        log.info("epoch %d: %s", epoch, "  ".join(f"{name} {value:.4g}" for name, value in sorted(metrics.items())))
        save_weights(self.network.state_dict(), self.folder / LAST)
        if metrics["val/loss"] < self.best_loss:
            self.best_loss, self.best_epoch = metrics["val/loss"], epoch
            save_weights(self.network.state_dict(), self.folder / WEIGHTS)

    def to_table(self) -> pd.DataFrame:
        """One row an epoch."""
        return pd.DataFrame(self.rows)


def build_trainer(max_epochs: int, patience: int, history: History) -> Trainer:
    """A Lightning trainer on whatever accelerator there is; bf16 mixed precision on CUDA."""
    return Trainer(
        max_epochs=max_epochs,
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=1,
        precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
        callbacks=[EarlyStopping("val/loss", patience=patience), history],
        enable_progress_bar=sys.stderr.isatty(),  # in a log file it would be a line a step; History has a line an epoch
        logger=False,
        enable_checkpointing=False,  # Lightning's are pickled; History keeps safetensors
        enable_model_summary=False,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
    )


def build_one_cycle(optimizer: torch.optim.Optimizer, trainer: Trainer) -> dict[str, Any]:
    """Warm-up to the optimizer's own rates, then cosine decay, by step (Smith and Topin, arXiv:1708.07120)."""
    rates = [group["lr"] for group in optimizer.param_groups]
    total_steps = int(trainer.estimated_stepping_batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=total_steps, pct_start=0.2)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def choose_epochs(num_images: int, input_pixels: int, budget_pixels: float, least: int, most: int) -> int:
    """As many epochs as show the network about `budget_pixels`, within [least, most]; a GPU gets 50 times as many."""
    if torch.cuda.is_available():
        budget_pixels *= 50
    return int(min(most, max(least, budget_pixels // (num_images * input_pixels))))


def choose_batch_size(num_images: int) -> int:
    """Small sets get small batches, so that an epoch has some steps; a GPU gets larger ones where there are many."""
    if torch.cuda.is_available() and num_images >= 20_000:
        return 256
    return 64 if num_images >= 1_000 else 16


def choose_num_workers() -> int:
    """Loading processes: on a CPU they would take the cores that train."""
    return min(8, torch.get_num_threads()) if torch.cuda.is_available() else 0
