"""The trainer that both kinds of model share: early stopping, best and last weights, history, going on after a stop."""

import logging
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping
from torch import nn
from torch.utils.data import DataLoader

from loupe.errors import ConfigError
from loupe.models.files import LAST, WEIGHTS, save_weights
from loupe.training.checkpoints import LastEpoch, SafetensorsIO, read_epoch

Report = Callable[[int, dict[str, float]], None]  # the epoch, from 0, and its metrics
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
CHECKPOINT = "checkpoint.safetensors"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """How long and how carefully is trained; `patience` counts epochs without progress of what judges them on val.

    Gradients of `accumulate` batches make a step; their norm is clipped to `gradient_clip`, 0 for never.
    """

    epochs: int
    patience: int
    precision: Precision
    accumulate: int = 1
    gradient_clip: float = 1.0


class History(Callback):
    """Keeps each epoch's metrics, tells them to the log and to `report`, and keeps the best and the last weights.

    The best epoch is the one with the lowest `judged_by`. After a stop it goes on where the checkpoint left it.
    """

    def __init__(self, network: nn.Module, folder: Path, report: Report, judged_by: str = "val/loss") -> None:
        self.network = network
        self.folder = folder
        self.report = report
        self.judged_by = judged_by
        self.rows: list[dict[str, float]] = []
        self.best_loss = math.inf
        self.best_epoch = 0

    def add(self, metrics: dict[str, float]) -> None:
        """Note an epoch; `network` holds its weights."""
        epoch = len(self.rows)
        self.rows.append({"epoch": epoch, **metrics})
        self.report(epoch, metrics)
        log.info("epoch %d: %s", epoch, "  ".join(f"{name} {value:.4g}" for name, value in sorted(metrics.items())))
        save_weights(self.network.state_dict(), self.folder / LAST)
        if metrics[self.judged_by] < self.best_loss:
            self.best_loss, self.best_epoch = metrics[self.judged_by], epoch
            save_weights(self.network.state_dict(), self.folder / WEIGHTS)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation has run by now, so that both kinds of metrics are there."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.add({**metrics, "learning_rate": max(group["lr"] for group in trainer.optimizers[0].param_groups)})

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "best_loss": self.best_loss, "best_epoch": self.best_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The new run is told the epochs of the stopped one too."""
        self.rows, self.best_loss = state_dict["rows"], state_dict["best_loss"]
        self.best_epoch = state_dict["best_epoch"]
        for row in self.rows:
            self.report(int(row["epoch"]), {name: value for name, value in row.items() if name != "epoch"})

    def check_finite(self, loss: float) -> None:
        """Raises ConfigError if the loss of what is to be kept is no finite number."""
        if not math.isfinite(loss):
            raise ConfigError(
                f"the training diverged: {self.judged_by} is no finite number; lower the learning_rate of this training"
            )

    def to_table(self) -> pd.DataFrame:
        """One row an epoch."""
        return pd.DataFrame(self.rows)


class SeededEpochs(Callback):
    """What is drawn in an epoch follows from (seed, epoch) alone, so that one after a stop draws the same."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            drawn = np.random.SeedSequence((self.seed, trainer.current_epoch)).generate_state(1)
            torch.manual_seed(int(drawn[0]))


class EarlyStop(EarlyStopping):
    """Lightning's; what it ended, and was then stopped before all was recorded, is not gone on with."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = self.wait_count >= self.patience


def fit(
    training: LightningModule,
    schedule: Schedule,
    history: History,
    train: DataLoader[Any],
    val: DataLoader[Any] | None,
    seed: int,
) -> None:
    """Train on whatever accelerator there is; go on from the checkpoint in the history's folder, if there is one.

    Args:
        val: what epochs are judged by; without it there are as many as the schedule has.

    Raises:
        ConfigError: if a batch does not fit the memory.
    """
    checkpoint = history.folder / CHECKPOINT
    resumes = checkpoint.exists()
    if resumes:
        epoch = read_epoch(checkpoint)
        log.info("going on after %d epochs: an earlier training was stopped", epoch)
        train.sampler.set_epoch(epoch)  # type: ignore[attr-defined]  # Lightning fetches a batch before it tells
    early_stops = [] if val is None else [EarlyStop(history.judged_by, patience=schedule.patience)]
    trainer = Trainer(
        max_epochs=schedule.epochs,
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=1,
        precision=schedule.precision,
        benchmark=True,  # cuDNN tries its kernels: batches are alike
        callbacks=[
            *early_stops,
            SeededEpochs(seed),
            history,
            LastEpoch(checkpoint),
        ],
        plugins=[SafetensorsIO()],
        enable_progress_bar=sys.stderr.isatty(),  # in a log file it would be a line a step; History has a line an epoch
        logger=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0 if val is None else None,
        accumulate_grad_batches=schedule.accumulate,
        gradient_clip_val=schedule.gradient_clip or None,
        log_every_n_steps=1,
    )
    judging: Any = [] if val is None else val  # Lightning warns of None
    try:
        trainer.fit(training, train, judging, ckpt_path=str(checkpoint) if resumes else None, weights_only=True)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise ConfigError(
            f"batches of {train.batch_size} images don't fit the memory: lower the batch_size of this training (and "
            "raise accumulate instead), or the input_size under `prepare` in params.yaml"
        ) from error
    training.to("cuda" if torch.cuda.is_available() else "cpu")  # Lightning leaves it on the CPU


def build_one_cycle(optimizer: torch.optim.Optimizer, trainer: Trainer) -> dict[str, Any]:
    """Warm-up to the optimizer's own rates, then cosine decay, by step (Smith and Topin, arXiv:1708.07120)."""
    rates = [group["lr"] for group in optimizer.param_groups]
    total_steps = max(2, int(trainer.estimated_stepping_batches))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        rates,
        total_steps=total_steps,
        pct_start=max(0.2, 1.5 / total_steps),  # torch wants the warm-up to be longer than a step
        cycle_momentum=bool({"momentum", "betas"} & optimizer.defaults.keys()),
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def build_cosine(optimizer: torch.optim.Optimizer, trainer: Trainer) -> dict[str, Any]:
    """A tenth of the steps warm up linearly, the rest decay along a cosine to zero."""
    total_steps = int(trainer.estimated_stepping_batches)
    warm_up = max(1, total_steps // 10)
    schedules = torch.optim.lr_scheduler
    schedule = schedules.SequentialLR(
        optimizer,
        [
            schedules.LinearLR(optimizer, start_factor=0.01, total_iters=warm_up),
            schedules.CosineAnnealingLR(optimizer, max(1, total_steps - warm_up)),
        ],
        [warm_up],
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def choose_precision() -> Precision:
    """bf16 where a GPU multiplies it faster; on a CPU it gained nothing with convolutions."""
    return "bf16-mixed" if torch.cuda.is_available() else "32-true"


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
