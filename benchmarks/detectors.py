"""How well the detectors find what is anomalous, how fast, and in how much memory.

`make bench-detectors` writes benchmarks/detectors.json. Each part runs in a process of its own; a part that is not
measured anew keeps the figures that it had. Nothing is chosen by test images.

    python benchmarks/detectors.py --tile /path/to/magnetic_tile      # all parts
    python benchmarks/detectors.py --parts one_class --all            # all normal images, for a machine with a GPU
"""

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
from torch import Tensor

from loupe.config import Params, TrainDetector, load_params
from loupe.data.fashion_mnist import LABELS, PARTS, obtain_files, unpack
from loupe.data.images import Geometry
from loupe.data.prepare import FEATURES, Prepared, choose_detector_geometry, load_prepared
from loupe.data.split import load_tasks
from loupe.detector_bench import NAMES, compute_spread
from loupe.errors import LoupeError
from loupe.evaluation.anomaly import compute_image_auroc
from loupe.evaluation.localization import compute_pixel_metrics
from loupe.models.detectors.base import Detector, FeatureDetector, fit_detector
from loupe.models.detectors.family import build_detector
from loupe.models.weights import build_backbone
from loupe.stages.detector_explanation import compute_in_batches
from loupe.stages.entry import save_json
from loupe.stages.files import DOWNLOADS, PREPARED, TASKS
from loupe.stages.ingest import ingest
from loupe.stages.prepare import prepare
from loupe.stages.split import split
from loupe.stages.train_detector import FITTED_AT_ONCE, build_config

PROJECT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_suffix(".json")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_NORMAL = 1000  # images of a class
AT_ONCE = 128  # small images
SIDE = 224
ROUNDS = {1: 50, 32: 10}  # of each size of batch
AIMS = {"one_class": {"auroc_mean": 0.945, "seconds": 180.0}, "latency": {"ratio": 1.5}}
SPREAD = ("image_auroc", "pixel_auroc", "aupro", "fit_seconds", "score_seconds", "peak_gb")
PEERS = {
    "source": "anomalib 2.7.0, the same backbone, 224 pixels, two CPU cores",
    "PaDiM": {"image_auroc": 0.859, "pixel_auroc": 0.701, "seconds": 43.0},
    "PatchCore, 2 % coreset": {"image_auroc": 0.846, "pixel_auroc": 0.754, "seconds": 1307.0},
}


def measure_one_class(files: Path, seeds: Sequence[int], num_normal: int | None) -> dict[str, Any]:
    """Each class of Fashion-MNIST normal in turn, and all official test images: AUROC by class and seed.

    Args:
        files: where the four published files are.
        num_normal: so many images of the class are drawn from those to train on; None takes all.
    """
    section = load_params(PROJECT / "params.yaml").train_detector
    (train, train_labels), (test, test_labels) = (read_part(files, part) for part in ("train", "test"))
    aurocs: dict[str, list[float]] = {label: [] for label in LABELS}
    seconds = []
    for seed in seeds:
        started = read_clock()
        normal = [draw_normal(train_labels, label, num_normal, seed) for label in range(len(LABELS))]
        detectors = [fit_closed_form(section, train[rows], seed) for rows in normal]
        scores = score_with_all(detectors, test).double().numpy()
        seconds.append(read_clock() - started)
        for label, values in enumerate(scores):
            aurocs[LABELS[label]].append(compute_image_auroc(test_labels != label, values))
    means = np.mean(list(aurocs.values()), axis=0).tolist()
    return {
        "detector": f"{section.model} of {section.backbone}",
        "num_normal": {label: len(rows) for label, rows in zip(LABELS, normal, strict=True)},
        "num_test": len(test),
        "seeds": list(seeds),
        "auroc": aurocs,
        "auroc_mean": means,
        "auroc_mean_over_seeds": compute_spread(means)._asdict(),
        "seconds_for_all_ten": seconds,
        "aims": AIMS["one_class"],
    }


def read_part(files: Path, part: str) -> tuple[Tensor, np.ndarray]:
    """Images, uint8 and channels first, and the numbers of their labels."""
    name = PARTS[part]
    images = np.frombuffer(unpack(files / f"{name}-images-idx3-ubyte.gz"), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    return torch.from_numpy(images.copy()), np.frombuffer(
        unpack(files / f"{name}-labels-idx1-ubyte.gz"), np.uint8, offset=8
    )


def draw_normal(labels: np.ndarray, label: int, number: int | None, seed: int) -> np.ndarray:
    """Rows of a class, without replacement; all of them where no number is given."""
    rows = np.flatnonzero(labels == label)
    return rows if number is None else np.random.default_rng([seed, label]).choice(rows, number, replace=False)


def fit_closed_form(section: TrainDetector, images: Tensor, seed: int) -> FeatureDetector:
    """The detector of these params, fitted to images at the geometry that the prepare stage would choose for them."""
    detector = build_for(section, choose_geometry(images, None))
    assert isinstance(detector, FeatureDetector)
    fit_detector(detector, images.split(AT_ONCE), seed, int(section.feature_gigabytes * 1e9))
    return detector


def choose_geometry(images: Tensor, input_size: tuple[int, int] | None) -> Geometry:
    """As the prepare stage does for what looks at features."""
    _, channels, height, width = images.shape
    mode = "L" if channels == 1 else "RGB"
    rows = pd.DataFrame({"width": [width], "height": [height], "mode": [mode], "bits": [None]})
    return choose_detector_geometry(rows, FEATURES, input_size, None)


def build_for(section: TrainDetector, geometry: Geometry) -> Detector:
    """A detector of these params for images of this geometry."""
    none = np.empty((0, geometry.height, geometry.width, geometry.channels), np.uint8)
    prepared = Prepared(none, none[..., 0], pd.DataFrame(), geometry)
    return build_detector(section.model, build_config(section, prepared), section.weights).to(DEVICE)


@torch.inference_mode()
def score_with_all(detectors: Sequence[FeatureDetector], images: Tensor) -> Tensor:
    """A row of raw scores a detector. They look at one frozen backbone, whose features are computed once for all."""
    parts = []
    for batch in images.split(AT_ONCE):
        features = detectors[0].extractor(batch.to(DEVICE))
        parts.append(torch.stack([detector.score_features(features)[0] for detector in detectors]))
    return torch.cat(parts, dim=1).cpu()


def measure_latency() -> dict[str, Any]:
    """Seconds of each detector on images of 224 x 224 in memory, against the bare network on the same, normalised.

    All see 224 x 224, are in one process and take turns; a first round of each does not count. A ratio is the median of
    the rounds' ratios. What is trained in epochs is as it was made, and the rest is fitted to noise: time does not
    depend on it.
    """
    section = load_params(PROJECT / "params.yaml").train_detector
    images = torch.randint(256, (max(ROUNDS), 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.manual_seed(0))
    detectors = {name: make_detector(section.model_copy(update={"model": name}), images) for name in NAMES}
    default = detectors[section.model]
    assert isinstance(default, FeatureDetector)
    backbone = build_backbone(section.backbone, section.weights).eval().to(DEVICE, memory_format=torch.channels_last)
    results = {}
    for batch_size, num_rounds in ROUNDS.items():
        batch = images[:batch_size].to(DEVICE)
        normalised = default.extractor.preprocess(batch)
        calls: dict[str, Callable[[], Any]] = {"backbone": lambda inputs=normalised: backbone(inputs)}  # type: ignore[misc]
        calls |= {name: lambda one=one, inputs=batch: one(inputs) for name, one in detectors.items()}  # type: ignore[misc]
        results[f"batches of {batch_size}"] = compare_calls(calls, num_rounds, batch_size)
    return {"backbone": section.backbone, "default": section.model, **results, "aims": AIMS["latency"]}


def make_detector(section: TrainDetector, images: Tensor) -> Detector:
    """Ready to score images."""
    detector = build_for(section, choose_geometry(images, (SIDE, SIDE)))
    if isinstance(detector, FeatureDetector):
        fit_detector(detector, images.split(FITTED_AT_ONCE), seed=0)
    return detector.eval()


@torch.inference_mode()
def compare_calls(calls: dict[str, Callable[[], Any]], num_rounds: int, batch_size: int) -> dict[str, Any]:
    """Milliseconds, images a second, and the ratio to the first of the calls."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(num_rounds + 1):
        for name, call in calls.items():
            started = read_clock()
            call()
            if number:
                seconds[name].append(read_clock() - started)
    bare = seconds[next(iter(calls))]
    return {
        name: {
            "milliseconds": 1000 * statistics.median(values),
            "images_per_second": batch_size / statistics.median(values),
            "ratio": statistics.median(np.divide(values, bare).tolist()),
        }
        for name, values in seconds.items()
    }


def read_clock() -> float:
    """Seconds, once the device has done all that it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def prepare_folder(source: Path, workspace: Path, seed: int) -> None:
    """The stages up to prepare, with the params as they are, in an empty folder."""
    os.chdir(workspace)
    params = change_params(source, seed)
    for stage in (ingest, split, prepare):
        stage(params)


def change_params(source: Path, seed: int) -> Params:
    """Those of the project, for another folder and seed."""
    params = load_params(PROJECT / "params.yaml")
    changed = params.ingest.model_copy(update={"source": source.as_posix()})
    return params.model_copy(update={"ingest": changed, "seed": seed})


def measure_folder(workspace: Path, section: TrainDetector, seed: int) -> dict[str, float]:
    """Fit to what was prepared, and test; seconds of both, and the peak of this process's memory up to there."""
    os.chdir(workspace)
    prepared, normal_label = load_prepared(PREPARED / "detector"), load_tasks(TASKS).normal_label
    detector = build_for(section, prepared.geometry)
    assert isinstance(detector, FeatureDetector)
    started = read_clock()
    batches = [torch.from_numpy(batch) for batch in prepared.read_batches(prepared.rows_of("train"), FITTED_AT_ONCE)]
    fit_detector(detector, batches, seed, int(section.feature_gigabytes * 1e9))
    fitted = read_clock()
    rows = prepared.rows_of("test")
    index = prepared.index.iloc[rows]
    is_anomalous, mask_rows = index["label"].ne(str(normal_label)).to_numpy(), index["mask_row"].to_numpy()
    known = ~is_anomalous | (mask_rows >= 0)
    scores, maps = compute_in_batches(detector, prepared, rows, known)
    scored = read_clock()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    masks = np.zeros(maps.shape, np.uint8)
    masks[mask_rows[known] >= 0] = prepared.masks[mask_rows[known & (mask_rows >= 0)]]
    return {
        "num_train": len(prepared.rows_of("train")),
        "num_test": len(rows),
        "input_height": prepared.geometry.input_height,
        "input_width": prepared.geometry.input_width,
        "image_auroc": compute_image_auroc(is_anomalous, scores),
        **compute_pixel_metrics(masks, maps),
        "fit_seconds": fitted - started,
        "score_seconds": scored - fitted,
        "peak_gb": peak,
    }


def compare_folder(source: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """The default detector on a folder, by seed, beside what is published of others."""
    section = load_params(PROJECT / "params.yaml").train_detector
    results = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as workspace:
            call_alone(prepare_folder, source, Path(workspace), seed)
            results.append(call_alone(measure_folder, Path(workspace), section, seed))
    spreads = {name: compute_spread([one[name] for one in results])._asdict() for name in SPREAD}
    return {"detector": section.model, "by_seed": dict(zip(seeds, results, strict=True)), **spreads, "peers": PEERS}


def call_alone(measure: Callable[..., Any], *arguments: Any) -> Any:
    """In a new process, whose memory and threads are its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def describe_machine() -> str:
    """Processor, cores, GPU and versions."""
    gpu = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "no GPU"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}"
    return f"{platform.machine()}, {os.cpu_count()} cores, {gpu}, {versions}"


def keep(part: str, figures: dict[str, Any]) -> None:
    """Write a part's figures beside those of the others, and show them."""
    print(json.dumps({part: figures}, indent=2), flush=True)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    command = " ".join(["python", *(Path(one).name if Path(one).is_dir() else one for one in sys.argv)])
    save_json({**known, part: {"machine": describe_machine(), "command": command, **figures}}, RESULTS)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=["one_class", "latency"], default=["one_class", "latency"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--idx", type=Path, default=DOWNLOADS, help="where Fashion-MNIST's files are, or are fetched to"
    )
    parser.add_argument("--all", action="store_true", help=f"fit to all images of a class, not to {NUM_NORMAL:,}")
    parser.add_argument("--tile", type=Path, help="the folder of Magnetic Tile, which is then measured too")
    arguments = parser.parse_args()
    try:
        if "one_class" in arguments.parts:
            obtain_files(arguments.idx)
            number = None if arguments.all else NUM_NORMAL
            keep("one_class", call_alone(measure_one_class, arguments.idx.resolve(), arguments.seeds, number))
        if "latency" in arguments.parts:
            keep("latency", call_alone(measure_latency))
        if arguments.tile is not None:
            keep("magnetic_tile", compare_folder(arguments.tile.resolve(), arguments.seeds))
    except LoupeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
