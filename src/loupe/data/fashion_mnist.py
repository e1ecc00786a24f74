"""The built-in data set: Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017, arXiv:1708.07747; MIT licence)."""

import gzip
import hashlib
import logging
import subprocess
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from loupe.errors import DataError

LABELS = ("t_shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle_boot")
PARTS = {"train": "train", "test": "t10k"}
PROJECT = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion"
PACKAGE = "dataset-fashion-mnist"
# sha256 of the unpacked files: the packed ones may differ in nothing but their headers.
SHA256 = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
TIMEOUT_SECONDS = 60
LARGEST_PACKED = 64 * 2**20
LARGEST_UNPACKED = 64 * 2**20

log = logging.getLogger(__name__)


def obtain_files(folder: Path) -> None:
    """Make sure that `folder` holds the four files, from its own project over HTTPS or from Debian's package.

    Raises:
        DataError: if a file there is not the published one, or if neither source can be had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in SHA256 if not (folder / name).exists()]
    for name in set(SHA256) - set(missing):
        unpack(folder / name)
    if not missing:
        return
    failures = []
    for source, obtain in (("its project over HTTPS", _download), (f"Debian's package {PACKAGE}", _extract_package)):
        try:
            _obtain_from(obtain, folder, missing)
        except (OSError, subprocess.SubprocessError, StopIteration, DataError) as error:
            failures.append(f"{source} ({_explain(error)})")
        else:
            log.info("fetched Fashion-MNIST from %s", source)
            return
    raise DataError(
        f"Fashion-MNIST can't be had from {' nor from '.join(failures)}: put {', '.join(SHA256)} into {folder} by hand"
    )


def _obtain_from(obtain: Callable[[Path], None], folder: Path, missing: list[str]) -> None:
    with tempfile.TemporaryDirectory(dir=folder.resolve()) as scratch:
        obtain(Path(scratch))
        for name in missing:
            found = next(Path(scratch).rglob(name))
            unpack(found)
            found.replace(folder / name)


def _explain(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return (error.stderr or b"").decode(errors="replace").strip().rpartition("\n")[2] or "it failed"
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    return str(error) or type(error).__name__


def _download(folder: Path) -> None:
    for name in SHA256:
        with urllib.request.urlopen(f"{PROJECT}/{name}", timeout=TIMEOUT_SECONDS) as answer:  # noqa: S310 (https above)
            (folder / name).write_bytes(answer.read(LARGEST_PACKED))


def _extract_package(folder: Path) -> None:
    """Debian's package without root: package lists and archives live in a folder of their own."""
    for name in ("lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    options = [
        f"-oDir::State::Lists={folder / 'lists'}",
        f"-oDir::Cache={folder / 'cache'}",
        "-oDebug::NoLocking=1",
        "-oAPT::Sandbox::User=",
    ]

    def call(*command: str) -> None:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=10 * TIMEOUT_SECONDS)

    call("apt-get", *options, "update")
    call("apt-get", *options, "download", PACKAGE)
    call("dpkg", "-x", str(next(folder.glob("*.deb"))), str(folder / "unpacked"))


def unpack(path: Path) -> bytes:
    """The content of one of the four files.

    Raises:
        DataError: if it is not the published one.
    """
    try:
        with gzip.open(path) as file:
            content = file.read(LARGEST_UNPACKED)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a gzip file ({error}): remove it and fetch again") from error
    if hashlib.sha256(content).hexdigest() != SHA256[path.name]:
        raise DataError(f"{path} is not the published file (its sha256 differs): remove it and fetch again")
    return content


def write_images(files: Path, folder: Path, fraction: float, seed: int) -> int:
    """Write a stratified part of the images as PNG files, `<folder>/<train|test>/<label>/<number>.png`.

    Args:
        files: where the four published files are.
        fraction: the part of each class that is taken, of train and of test; 1.0 takes all.

    Returns:
        The number of images written.
    """
    num_images = 0
    for split, name in PARTS.items():
        images = _read_images(files / f"{name}-images-idx3-ubyte.gz")
        labels = np.frombuffer(unpack(files / f"{name}-labels-idx1-ubyte.gz"), np.uint8, offset=8)
        for row in _take_part(labels, fraction, seed):
            path = folder / split / LABELS[labels[row]] / f"{row:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[row]).save(path)
            num_images += 1
    return num_images


def _read_images(path: Path) -> UInt8[np.ndarray, "num_images 28 28"]:
    return np.frombuffer(unpack(path), np.uint8, offset=16).reshape(-1, 28, 28)


def _take_part(labels: UInt8[np.ndarray, " num_images"], fraction: float, seed: int) -> np.ndarray:
    """Row numbers of the same fraction of each class, in order."""
    generator = np.random.default_rng(seed)
    taken = [
        generator.permutation(rows)[: max(1, round(fraction * len(rows)))]
        for rows in (np.flatnonzero(labels == label) for label in range(len(LABELS)))
    ]
    return np.sort(np.concatenate(taken))
