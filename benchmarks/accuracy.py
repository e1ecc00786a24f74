"""Test accuracy of the classifier over seeds of split and training, with the time that each training took.

The working copy stays as it is: each seed is a DVC experiment. Nothing is chosen by the test images: each seed keeps
its best epoch by val.

    python benchmarks/accuracy.py flowers --seeds 0 1 2 3 4 --set ingest.source=/path/to/flowers
    python benchmarks/accuracy.py fashion_mnist --profile fashion_mnist      # on a machine with a GPU
"""

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from loupe.config import load_params
from loupe.errors import LoupeError
from loupe.experiments import Experiment, Result, run_experiments
from loupe.tracking.runs import connect

RESULTS = Path(__file__).with_suffix(".json")
PROFILES: dict[str, dict[str, Any]] = {
    # All 70,000 images, by one network: for a GPU, on which the images lie whole and are augmented in batches.
    "fashion_mnist": {
        "ingest.source": "data/fashion_mnist/images",
        "fetch.fraction": 1.0,
        "split.val_fraction": 0.05,
        "split.calibration_fraction": 0.02,
        "prepare.classifier.input_size": 128,
        "train_classifier.epochs": 40,
        "train_classifier.patience": 40,
        "train_classifier.batch_size": 256,
        "train_classifier.learning_rate": 0.002,
        "train_classifier.drop_path": 0.1,
        "train_classifier.cutmix": 1.0,
        "train_classifier.ema_decay": 0.999,
    }
}


def main() -> None:
    """Train and test once for each seed, and write the figures beside this file, under a name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="under which the figures are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--profile", choices=PROFILES)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="params, beside the profile's")
    arguments = parser.parse_args()
    changes = PROFILES.get(arguments.profile, {}) | dict(_parse(one) for one in arguments.set)
    experiments = [Experiment(f"{arguments.name}-{seed}", {**changes, "seed": seed}) for seed in arguments.seeds]
    try:
        results = run_experiments(experiments, "classifier", load_params(), print)
    except LoupeError as error:
        sys.exit(f"error: {error}")
    figures = _summarise(dict(zip(arguments.seeds, results, strict=True)), changes)
    _keep(arguments.name, figures)
    print(json.dumps(figures, indent=2))


def _parse(change: str) -> tuple[str, Any]:
    key, _, value = change.partition("=")
    return key, yaml.safe_load(value)


def _summarise(results: dict[int, Result], changes: dict[str, Any]) -> dict[str, Any]:
    accuracies = {seed: result.figures["classifier/test/accuracy"] for seed, result in results.items()}
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "params": {key: value for key, value in changes.items() if key != "ingest.source"},
        "test/accuracy": accuracies,
        "test/accuracy_mean": float(np.mean(list(accuracies.values()))),
        "test/accuracy_std": float(np.std(list(accuracies.values()))),
        "training_seconds": {seed: _measure_seconds(result) for seed, result in results.items()},
    }


def _measure_seconds(result: Result) -> float:
    """From the start of its MLflow run to the end."""
    info = connect(result.data_set.name).get_run(result.run_id).info
    return float(info.end_time - info.start_time) / 1000


def _keep(name: str, figures: dict[str, Any]) -> None:
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    unfinished = RESULTS.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({**known, name: figures}, indent=2) + "\n")
    unfinished.replace(RESULTS)


if __name__ == "__main__":
    main()
