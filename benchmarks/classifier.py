"""How fast a classifier trains: our training against what the device can do, and against timm's own training loop.

`make bench-classifier` makes its own images, trains in rounds of one epoch for each in turn, and writes
benchmarks/classifier.json. A ratio is the median of the rounds' ratios: what else the machine does hits both sides.
"""

import argparse
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
from PIL import Image
from pytorch_lightning import LightningModule, Trainer
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from timm.utils import AverageMeter, dispatch_clip_grad
from torch.nn import functional as F

from loupe.config import load_params
from loupe.data.loading import PreparedDataset
from loupe.data.prepare import choose_classifier_geometry, load_prepared, prepare_images
from loupe.data.transforms import build_augmentation, choose_policy
from loupe.models.classifiers import ClassifierConfig, build_classifier, get_data_config
from loupe.models.depthwise import FastDepthwise
from loupe.models.optimization import build_optimizer
from loupe.stages.entry import save_json
from loupe.stages.train_classifier import build_config, choose_recipe
from loupe.training.classifier import Recipe, train_whole
from loupe.training.trainer import History

BACKBONE, LABELS = "tf_efficientnet_lite0", [str(label) for label in range(10)]
RESULTS = Path(__file__).with_name("classifier.json")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_CORES = os.cpu_count() or 1
TIMM_WORKERS = (NUM_CORES,) if DEVICE.type == "cuda" else (0, NUM_CORES)  # on a CPU they take the cores that train


@dataclass(frozen=True)
class Setting:
    """Images as a user has them, what of timm's augmentation is nearest to our policy for them, and how many there are.

    `size` is width and height in pixels; `aim` is what we want to reach of the ceiling.
    """

    size: tuple[int, int]
    mode: str
    suffix: str
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    color_jitter: tuple[float, ...] | None
    batch_size: int
    num_batches: int
    aim: float

    @property
    def num_images(self) -> int:
        """All batches are full."""
        return self.batch_size * self.num_batches


# `light` shifts and scales by 7 %, as a crop can; it turns by 5 degrees too, for which timm's training has nothing.
SMALL = Setting((28, 28), "L", "png", (0.87, 1.0), (1.0, 1.0), None, batch_size=64, num_batches=16, aim=0.95)
PHOTO = Setting(
    (500, 375), "RGB", "jpg", (0.5, 1.0), (0.8, 1.25), (0.2, 0.2, 0.2, 0.02), batch_size=32, num_batches=4, aim=0.95
)
SETTINGS = {
    "cpu": {"small": SMALL, "photo": PHOTO},
    "cuda": {
        "small": replace(SMALL, batch_size=256, num_batches=200),
        "photo": replace(PHOTO, batch_size=256, num_batches=100, aim=0.90),
    },
}
TIMM_AIM = 1.0


@dataclass(frozen=True)
class Case:
    """One setting made ready: a class folder, the same images prepared, and how they are trained on."""

    setting: Setting
    folder: Path
    config: ClassifierConfig
    recipe: Recipe
    train: PreparedDataset
    val: PreparedDataset


def make_case(setting: Setting, workspace: Path) -> Case:
    """Make the images, and do with them what the stages prepare, augment and train_classifier do."""
    rows = make_images(workspace / "images", setting)
    native = get_data_config(BACKBONE)
    geometry = choose_classifier_geometry(
        rows, None, None, native.input_size, native.crop_fraction, native.interpolation
    )
    prepare_images(workspace / "images", rows, geometry, workspace / "prepared")
    prepared = load_prepared(workspace / "prepared")
    section = load_params(Path(__file__).parent.parent / "params.yaml").train_classifier
    changes = {"backbone": BACKBONE, "recipe": "scratch_augmented", "epochs": 2, "batch_size": setting.batch_size}
    section = section.model_copy(update=changes)
    positions, targets = np.arange(len(rows)), prepared.index["label"].to_numpy(np.int64)
    augmentation = build_augmentation(choose_policy("auto", "classifier", geometry)[1])
    return Case(
        setting,
        workspace / "images",
        build_config(section, "package", prepared, LABELS),  # grey is repeated thrice, as for pretrained weights
        choose_recipe(section, prepared),
        PreparedDataset(prepared.images, positions, targets, augmentation, seed=0),
        PreparedDataset(prepared.images, positions[:1], targets[:1], None, seed=0),
    )


def make_images(folder: Path, setting: Setting) -> pd.DataFrame:
    """Write a class folder, and tell of each image what a manifest tells."""
    for label in LABELS:
        (folder / label).mkdir(parents=True)
    labels = LABELS * (setting.num_images // len(LABELS) + 1)
    paths = [f"{labels[number]}/{number:06d}.{setting.suffix}" for number in range(setting.num_images)]
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
        for _ in pool.map(make_image, [folder / path for path in paths], repeat(setting), chunksize=256):
            pass
    rows = pd.DataFrame({"image_id": paths, "path": paths, "label": labels[: len(paths)], "mask_path": None})
    width, height = setting.size
    sizes = [(folder / path).stat().st_size for path in paths]
    return rows.assign(split="train", num_bytes=sizes, width=width, height=height, mode=setting.mode, bits=None)


def make_image(path: Path, setting: Setting) -> None:
    """Smooth large shapes and some texture, as photos have them."""
    generator, (width, height) = np.random.default_rng(int(path.stem)), setting.size
    coarse = Image.fromarray(generator.integers(0, 255, (9, 12, 3), np.uint8))
    fine = Image.fromarray(generator.integers(0, 255, (height // 4, width // 4, 3), np.uint8))
    coarse, fine = coarse.resize(setting.size, Image.Resampling.BICUBIC), fine.resize(setting.size)
    Image.blend(coarse, fine, 0.12).convert(setting.mode).save(path, quality=88)


def read_clock() -> float:
    """Seconds, once the device has done all that it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock(History):
    """A history that also notes how long the steps of the last epoch took, its first batch's coming included."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = read_clock()

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        if trainer.is_last_batch:
            self.seconds = read_clock() - self.started


def train_ours(case: Case) -> Iterator[float]:
    """The project's own training of the whole network, anew each time: one epoch to warm up, and one measured."""
    while True:
        classifier = build_classifier(case.config, "none")
        with tempfile.TemporaryDirectory() as folder:
            clock = Clock(classifier, Path(folder), lambda epoch, metrics: None)
            train_whole(classifier, case.train, case.val, case.recipe, clock)
        yield clock.seconds


def train_ceiling(case: Case) -> Iterator[float]:
    """The same network, gradients and optimizer in a bare loop, on one batch that is ready on the device."""
    recipe = case.recipe
    classifier = build_classifier(case.config, "none").to(DEVICE).train()
    backbone = classifier.backbone
    optimizer = build_optimizer(
        backbone, recipe.optimizer, recipe.learning_rate, recipe.weight_decay, recipe.layer_decay
    )
    images = torch.from_numpy(case.train.images[: recipe.batch_size]).permute(0, 3, 1, 2)
    inputs, targets = classifier.preprocess(images.to(DEVICE)), case.train.targets[: recipe.batch_size].to(DEVICE)
    while True:
        started = read_clock()
        for _ in range(case.setting.num_batches):
            optimizer.zero_grad()
            with autocast(recipe), FastDepthwise() if DEVICE.type == "cpu" else nullcontext():
                loss = F.cross_entropy(backbone(inputs), targets, label_smoothing=recipe.label_smoothing)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(backbone.parameters(), recipe.schedule.gradient_clip)
            optimizer.step()
        yield read_clock() - started


def train_timm(case: Case, num_workers: int) -> Iterator[float]:
    """An epoch as `train_one_epoch` of timm's train.py has it, from the files, with timm's parts alone."""
    recipe, memory_format = case.recipe, case.config.memory_format
    model = timm.create_model(BACKBONE, num_classes=len(LABELS)).to(DEVICE, memory_format=memory_format).train()
    task = ClassificationTask(model, criterion_kwargs={"smoothing": recipe.label_smoothing}, device=DEVICE)
    optimizer = create_optimizer_v2(model, recipe.optimizer, recipe.learning_rate, recipe.weight_decay)
    loader = build_timm_loader(case, num_workers)
    while True:
        losses, started = AverageMeter(), read_clock()
        for inputs, targets in loader:
            with autocast(recipe):
                loss = task(inputs.contiguous(memory_format=memory_format), targets)["loss"]
            loss.backward()
            dispatch_clip_grad(model.parameters(), value=recipe.schedule.gradient_clip)
            optimizer.step()
            losses.update(loss.item(), len(inputs))
            optimizer.zero_grad()
        yield read_clock() - started


def build_timm_loader(case: Case, num_workers: int) -> Any:
    """The loader and prefetcher of timm over a class folder, augmenting as our policy does where timm can."""
    return create_loader(
        create_dataset("", str(case.folder), is_training=True),
        (case.config.channels, *case.config.size),
        case.recipe.batch_size,
        is_training=True,
        scale=case.setting.crop_scale,
        ratio=case.setting.crop_ratio,
        color_jitter=case.setting.color_jitter,
        color_jitter_prob=0.8,
        mean=case.config.mean,
        std=case.config.std,
        num_workers=num_workers,
        pin_memory=DEVICE.type == "cuda",
        device=DEVICE,
    )


def autocast(recipe: Recipe) -> torch.autocast:
    """The recipe's precision."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=recipe.schedule.precision == "bf16-mixed")


def measure(case: Case, num_rounds: int) -> dict[str, list[float]]:
    """Images a second, of each training in each round; a round before them warms up."""
    trainings = {"ours": train_ours(case), "ceiling": train_ceiling(case)}
    trainings |= {f"timm, {number} workers": train_timm(case, number) for number in TIMM_WORKERS}
    speeds: dict[str, list[float]] = {name: [] for name in trainings}
    for number in range(num_rounds + 1):
        for name, training in trainings.items():
            torch.backends.cudnn.benchmark = name != "ours"  # ours sets it itself, as timm's train.py does
            seconds = next(training)
            if number:
                speeds[name].append(case.setting.num_images / seconds)
    return speeds


def compare(name: str, num_rounds: int) -> dict[str, object]:
    """All trainings on one setting, and what ours reaches of the ceiling and of timm's fastest."""
    setting = SETTINGS[DEVICE.type][name]
    with tempfile.TemporaryDirectory() as workspace:
        case = make_case(setting, Path(workspace))
        speeds = measure(case, num_rounds)
    size = " x ".join(map(str, case.config.size))
    print(f"{name}: {setting.num_images} images at {size}, batches of {setting.batch_size}")
    medians = {training: statistics.median(values) for training, values in speeds.items()}
    for training, speed in medians.items():
        print(f"  {training:18}{speed:10.1f} images/s")
    fastest = max((training for training in medians if training.startswith("timm")), key=medians.__getitem__)
    result: dict[str, object] = {"setting": asdict(setting), "images_per_second": speeds}
    for rival, aim in (("ceiling", setting.aim), (fastest, TIMM_AIM)):
        ratio = statistics.median(np.divide(speeds["ours"], speeds[rival]).tolist())
        print(f"  ours to {rival}: {ratio:.3f}, aim {aim}")
        result[f"ours to {rival}"] = {"ratio": ratio, "aim": aim}
    return result


def describe_machine() -> str:
    """Processor, cores, GPU and versions."""
    gpu = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "no GPU"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}"
    return f"{platform.machine()}, {NUM_CORES} cores, {gpu}, {versions}"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", nargs="+", choices=["small", "photo"], default=["small", "photo"])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", category=FutureWarning)
    figures = {name: compare(name, arguments.rounds) for name in arguments.settings}
    command = " ".join(["python", *sys.argv])
    save_json({"machine": describe_machine(), "command": command, "figures": figures}, RESULTS)


if __name__ == "__main__":
    main()
