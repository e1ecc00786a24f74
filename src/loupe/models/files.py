"""A model on disk: a folder with model.safetensors and config.json. No pickle is written, and none is read."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loupe.errors import WeightsError

WEIGHTS, CONFIG = "model.safetensors", "config.json"
LAST = "last.safetensors"  # weights of the last epoch, beside those of the best


def save_model(network: nn.Module, config: dict[str, Any], folder: Path) -> None:
    """Write weights and config into `folder`, each whole."""
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(network.state_dict(), folder / WEIGHTS)
    unfinished = folder / f"{CONFIG}.unfinished"
    unfinished.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(folder / CONFIG)


def save_weights(state: dict[str, Tensor], path: Path) -> None:
    """Write a state dict as safetensors, whole: a reader sees the old file or the new one."""
    unfinished = path.with_suffix(".unfinished")
    # Copies, as some networks have tensors that share their memory.
    save_file({key: value.detach().cpu().contiguous().clone() for key, value in state.items()}, unfinished)
    unfinished.replace(path)


def load_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a model's folder."""
    values: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return values


def load_weights(network: nn.Module, path: Path) -> None:
    """Load a safetensors file into a network, every key of both matching.

    Raises:
        WeightsError: if the file can't be read or does not fit; names what differs.
    """
    try:
        state = load_file(path)
    except Exception as error:  # safetensors raises its own, OSError or ValueError
        raise WeightsError(f"{path} can't be read as safetensors: {error}") from error
    fit_weights(network, state, str(path))


def fit_weights(network: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load a state dict strictly.

    Raises:
        WeightsError: if keys or shapes differ; names the first of them.
    """
    wanted = network.state_dict()
    wrong = [key for key in wanted if key not in state or state[key].shape != wanted[key].shape]
    wrong += [key for key in state if key not in wanted]
    if wrong:
        raise WeightsError(
            f"the weights of {source} don't fit the network: {len(wrong)} of its {len(wanted)} tensors "
            f"differ in name or shape, first {wrong[0]!r}; choose the network they were made for"
        )
    network.load_state_dict(state)
