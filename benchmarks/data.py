"""How fast images come in: ingest and validate against a bare decode, and the training loader against its rivals.

`make bench-data` makes its own JPEGs, runs everything in one go, and writes benchmarks/data.json. Each measurement is
a process of its own, so that its peak memory is its own; imports are not counted.
"""

import argparse
import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = {  # pixels
    "photos": ((640, 480), (500, 375), (375, 500), (320, 240), (800, 600)),  # as on the web
    "camera": ((1280, 1024), (1600, 1200)),  # sensors of inspection cameras
}
NUM_LABELS, MANY = 10, 20_000
NUM_AUGMENTED, SIDE, BATCH_SIZE, EPOCHS = 1_000, 256, 64, 3
RESULTS = Path(__file__).with_name("data.json")


def make_images(folder: Path, num_images: int, kind: str) -> None:
    """Write JPEGs with the statistics of photos: smooth large shapes, some texture, some noise."""
    for label in range(NUM_LABELS):
        (folder / f"label_{label}").mkdir(parents=True)
    with ProcessPoolExecutor() as pool:
        for _ in pool.map(_make_image, [folder] * num_images, range(num_images), [kind] * num_images, chunksize=64):
            pass


def _make_image(folder: Path, number: int, kind: str) -> None:
    generator = np.random.default_rng(number)
    width, height = SIZES[kind][number % len(SIZES[kind])]
    coarse = Image.fromarray(generator.integers(0, 255, (9, 12, 3), np.uint8))
    coarse = coarse.resize((width, height), Image.Resampling.BICUBIC)
    fine = Image.fromarray(generator.integers(0, 255, (height // 4, width // 4, 3), np.uint8)).resize((width, height))
    Image.blend(coarse, fine, 0.12).save(folder / f"label_{number % NUM_LABELS}" / f"{number:06d}.jpg", quality=88)


def measure_bare(folder: Path) -> Iterator[int]:
    """Read, decode and hash, in parallel, and nothing else."""

    def work(path: Path) -> str:
        content = path.read_bytes()
        with Image.open(path) as image:
            image.load()
        return hashlib.sha256(content).hexdigest()

    yield 0
    paths = sorted(folder.rglob("*.jpg"))
    with ThreadPoolExecutor() as pool:
        yield len(set(pool.map(work, paths)))


def measure_ingest(folder: Path) -> Iterator[int]:
    """The ingest stage and the validate stage, as `dvc repro` runs them."""
    from loupe.config import load_params
    from loupe.stages.ingest import ingest
    from loupe.stages.validate import validate

    params = load_params(Path(__file__).parent.parent / "params.yaml")
    params = params.model_copy(update={"ingest": params.ingest.model_copy(update={"source": str(folder)})})
    with tempfile.TemporaryDirectory() as workspace:
        os.chdir(workspace)
        yield 0
        ingest(params)
        validate(params)
        yield len(list(folder.rglob("*.jpg")))
        os.chdir(folder)


def measure_repro(folder: Path) -> Iterator[int]:
    """`dvc repro validate` once more, where nothing has changed, in a copy of the project."""
    from loupe.cli import change_params

    project, environment = Path(__file__).parent.parent, {**os.environ, "DVC_NO_ANALYTICS": "1"}

    def call(*command: str) -> None:
        subprocess.run([sys.executable, "-m", "dvc", *command], check=True, env=environment)

    with tempfile.TemporaryDirectory() as workspace:
        os.chdir(workspace)
        shutil.copytree(project / "src", "src")
        for name in ("dvc.yaml", "params.yaml", "data/fashion_mnist/dvc.yaml"):
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(project / name, name)
        change_params(Path("params.yaml"), {"ingest.source": str(folder)})
        call("init", "--quiet", "--no-scm")
        call("repro", "--quiet", "validate")
        yield 0
        call("repro", "--quiet", "validate")
        yield len(list(folder.rglob("*.jpg")))
        os.chdir(folder)


def measure_loader(folder: Path) -> Iterator[int]:
    """Our loader with the photo policy, two workers."""
    from loupe.data.loading import PreparedDataset, build_loader

    images, augmentation = _load_augmented()
    dataset = PreparedDataset(images, np.arange(len(images)), np.zeros(len(images), np.int64), augmentation, seed=0)
    loader = build_loader(dataset, BATCH_SIZE, shuffle=True, num_workers=os.cpu_count() or 1)
    yield sum(len(batch) for batch, _ in loader) * 0  # workers start, and stay
    yield sum(len(batch) for _ in range(EPOCHS) for batch, _ in loader)


def measure_albumentations(folder: Path) -> Iterator[int]:
    """The same policy alone: a loop in each of as many processes, nothing seeded, nothing collated."""
    num_workers = os.cpu_count() or 1
    with ProcessPoolExecutor(num_workers) as pool:
        list(pool.map(_augment_alone, [1] * num_workers))
        yield 0
        yield sum(pool.map(_augment_alone, [EPOCHS * NUM_AUGMENTED // num_workers] * num_workers))


def _augment_alone(num_images: int) -> int:
    images, augmentation = _load_augmented()
    for number in range(num_images):
        augmentation(image=images[number % len(images)])
    return num_images


def _load_augmented() -> tuple[np.ndarray, Callable[..., dict[str, np.ndarray]]]:
    import cv2

    from loupe.data.images import Geometry
    from loupe.data.transforms import build_augmentation, choose_policy

    cv2.setNumThreads(0)  # as in a loader's workers
    geometry = Geometry(SIDE, SIDE, 3, 224, 224, 224, 224, "crop", "bicubic")
    return _draw_images(), build_augmentation(choose_policy("photo", "classifier", geometry)[1])


def _draw_images() -> np.ndarray:
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 255, (NUM_AUGMENTED, 8, 8, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(one).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for one in coarse])


class _TorchvisionDataset:
    def __init__(self) -> None:
        import torch
        from torchvision.transforms import v2

        self.images = torch.from_numpy(_draw_images()).permute(0, 3, 1, 2)
        jitter = v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.02)
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(SIDE, scale=(0.5, 1.0), ratio=(0.8, 1.25)),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([jitter], 0.8),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> object:
        return self.transform(self.images[index])


def measure_torchvision(folder: Path) -> Iterator[int]:
    """Torchvision v2 doing the same to uint8 tensors, in torch's loader with as many workers."""
    from torch.utils.data import DataLoader

    loader = DataLoader(
        _TorchvisionDataset(), BATCH_SIZE, shuffle=True, num_workers=os.cpu_count() or 1, persistent_workers=True
    )
    yield sum(len(batch) for batch in loader) * 0
    yield sum(len(batch) for _ in range(EPOCHS) for batch in loader)


MEASURES = {name.removeprefix("measure_"): value for name, value in globals().items() if name.startswith("measure_")}


def measure(name: str, folder: Path) -> None:
    """Run one measurement in this process, and print it as JSON."""
    steps = MEASURES[name](folder)
    next(steps)
    started = time.perf_counter()
    num_images = next(steps)
    seconds = time.perf_counter() - started
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 2**20
    print("measured", json.dumps({"images_per_second": num_images / seconds, "seconds": seconds, "peak_gb": peak}))
    for _ in steps:
        pass


def call_measure(name: str, folder: Path) -> dict[str, float]:
    """Run one measurement in a process of its own."""
    answer = subprocess.run(
        [sys.executable, __file__, "--measure", name, str(folder)], capture_output=True, text=True, check=True
    )
    result: dict[str, float] = json.loads(answer.stdout.rpartition("measured ")[2])
    speed, seconds, peak = (result[key] for key in ("images_per_second", "seconds", "peak_gb"))
    print(f"{name:16}{speed:10.0f} images/s  {seconds:8.1f} s  {peak:5.2f} GB")
    return result


def compare_ingest(kind: str, count: int) -> dict[str, object]:
    """Ingest and validate against a bare decode and hash; of many images, `dvc repro` without changes too."""
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder), count, kind)
        bare, ours = call_measure("bare", Path(folder)), call_measure("ingest", Path(folder))
        result = {"bare": bare, "ours": ours, "ratio": ours["images_per_second"] / bare["images_per_second"]}
        print(f"{count} images as of {kind}: ingest and validate reach {result['ratio']:.2f} of a bare decode and hash")
        if count >= MANY:
            result["repro_without_changes"] = call_measure("repro", Path(folder))
    return result


def compare_loaders() -> dict[str, object]:
    """The training loader against albumentations alone and against torchvision."""
    ours, alone, rival = (call_measure(name, Path()) for name in ("loader", "albumentations", "torchvision"))
    results: dict[str, object] = {"ours": ours}
    for name, other in (("albumentations", alone), ("torchvision", rival)):
        ratio = ours["images_per_second"] / other["images_per_second"]
        print(f"the loader reaches {ratio:.2f} of {name}")
        results[name] = {**other, "ratio": ratio}
    return results


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", nargs="+", default=["photos:1000", "camera:1000", "photos:100000"])
    parser.add_argument("--measure", nargs=2)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure[0], Path(arguments.measure[1]).resolve())
        return
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    results: dict[str, object] = {"machine": machine, "loader": compare_loaders()}
    for one in arguments.sets:
        kind, _, count = one.partition(":")
        results[f"ingest {one}"] = compare_ingest(kind, int(count))
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
