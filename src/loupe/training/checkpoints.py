"""Checkpoints that a stopped training goes on from: safetensors and JSON instead of a pickle."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import CheckpointIO
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

TREE, TENSOR, PAIRS, TUPLE, DTYPE = "tree", "__tensor__", "__pairs__", "__tuple__", "__dtype__"


class SafetensorsIO(CheckpointIO):
    """Tensors go into a safetensors file, the tree of plain values around them into its header."""

    def save_checkpoint(self, checkpoint: Mapping[str, Any], path: Any, storage_options: Any = None) -> None:
        """Written whole: a reader sees the old file or the new one."""
        tensors: dict[str, Tensor] = {}
        tree = json.dumps(_take_tensors(checkpoint, tensors))
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        save_file(tensors, unfinished, {TREE: tree})
        unfinished.replace(path)

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """What `save_checkpoint` was given; tensors are on the CPU."""
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - the file is no dict
            tree: dict[str, Any] = _put_tensors(json.loads(file.metadata()[TREE]), tensors)
        return tree

    def remove_checkpoint(self, path: Any) -> None:
        """A missing one is fine."""
        Path(path).unlink(missing_ok=True)


class LastEpoch(Checkpoint):
    """Keeps the state of the last epoch that ended; Lightning calls it after all that the epoch's end changes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.path)


def _take_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree with a reference in place of each tensor; keys that JSON would turn into text are kept as pairs."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {TENSOR: name}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: _take_tensors(item, tensors) for key, item in value.items()}
        return {PAIRS: [[key, _take_tensors(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_take_tensors(item, tensors) for item in value]
        return {TUPLE: items} if isinstance(value, tuple) else items
    return {DTYPE: str(value).removeprefix("torch.")} if isinstance(value, torch.dtype) else value


def _put_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_put_tensors(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if TENSOR in value:
        return tensors[value[TENSOR]]
    if TUPLE in value:
        return tuple(_put_tensors(item, tensors) for item in value[TUPLE])
    if DTYPE in value:
        return getattr(torch, value[DTYPE])
    if PAIRS in value:
        return {key: _put_tensors(item, tensors) for key, item in value[PAIRS]}
    return {key: _put_tensors(item, tensors) for key, item in value.items()}


def read_epoch(path: Path) -> int:
    """How many epochs a checkpoint has behind it."""
    with safe_open(path, framework="pt") as file:
        epoch: int = json.loads(file.metadata()[TREE])["epoch"]
    return epoch + 1
