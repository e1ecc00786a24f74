"""What the trained detector makes of images: pictures of originals and reconstructions, and latent vectors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from torch import Tensor

from loupe.data.images import Geometry, read_image
from loupe.data.manifest import save_table
from loupe.data.prepare import load_prepared
from loupe.data.sources import list_images
from loupe.errors import ConfigError, DataError
from loupe.models.detectors.autoencoder import Autoencoder
from loupe.models.detectors.base import Detector, detect
from loupe.models.detectors.denoising_autoencoder import DenoisingAutoencoder
from loupe.models.detectors.family import load_detector
from loupe.models.files import CONFIG, load_config
from loupe.stages.files import MODELS, PREPARED, SKIPPED

FOLDER = MODELS / "detector"
NUM_SHOWN = 8
BATCH_SIZE = 16

Rows = Mapping[str, Float[np.ndarray, "num_images height width channels"]]
Pixels = UInt8[Tensor, "num_images channels height width"]


@dataclass(frozen=True)
class Images:
    """Images that are read when they are needed: `names` and perhaps more columns in `table`, a row an image.

    `shown` are the positions of those that go into the picture.
    """

    table: pd.DataFrame
    shown: Sequence[int]
    read: Callable[[Sequence[int]], Pixels]


def show_reconstructions(source: Path | None, out: Path, latents: Path | None) -> list[Path]:
    """Write a picture of a few images, and the latent vectors of all where they are asked for; gives what was written.

    Args:
        source: an image or a folder of images; None takes the prepared test images.
        out: a PNG file. A detector that rebuilds no whole images writes none.
        latents: a Parquet file with a column `latent` of lists; None for none.

    Raises:
        ConfigError: if nothing is trained, or there would be nothing to write.
        DataError: if the images can't be read, or are prepared for another detector.
    """
    detector, config = _load_trained()
    rebuilds = isinstance(detector, Autoencoder)
    if not rebuilds and latents is None:
        raise ConfigError(
            f"the trained detector, {detector.name}, rebuilds no whole images: train an autoencoder of pixels without "
            "tiles (train_detector in params.yaml), or ask for its --latents"
        )
    images = _open_prepared(config) if source is None else _open_files(source, Geometry(**config["geometry"]))
    written = []
    if latents is not None:
        save_table(images.table.assign(latent=_embed(detector, images)), latents)
        written.append(latents)
    if isinstance(detector, Autoencoder):
        pixels = images.read(images.shown)
        scores, maps = detect(detector, pixels)
        names = images.table["image"].iloc[list(images.shown)]
        titles = [f"{_shorten(name)}\n{score:.4g}" for name, score in zip(names, scores.tolist(), strict=True)]
        _save_figure(draw_reconstructions(rebuild(detector, pixels), maps.numpy(), titles), out)
        written.append(out)
    return written


def _load_trained() -> tuple[Detector, dict[str, Any]]:
    if (FOLDER / SKIPPED).exists():
        raise ConfigError(f"the data allowed no detector: {FOLDER / SKIPPED} says why")
    if not (FOLDER / CONFIG).exists():
        raise ConfigError(f"{FOLDER} holds no trained detector: `make run` trains one")
    detector = load_detector(FOLDER).to("cuda" if torch.cuda.is_available() else "cpu")
    return detector, load_config(FOLDER)


def _open_prepared(config: Mapping[str, Any]) -> Images:
    """The test images; half of those that are shown are normal, and the others take turns by their label."""
    folder = PREPARED / "detector"
    if not (folder / "images.npy").exists():
        raise DataError(f"{folder} holds no images: name an image or a folder of images, or prepare some by `make run`")
    prepared = load_prepared(folder)
    if prepared.geometry != Geometry(**config["geometry"]):
        raise DataError(f"the images in {folder} are prepared for another detector: train it by `make run`")
    rows = prepared.rows_of("test")
    table = prepared.index.iloc[rows][["path", "label"]].rename(columns={"path": "image"}).reset_index(drop=True)
    normal = table.index[table["label"].eq(config["normal_label"])]
    others = table[table["label"].ne(config["normal_label"])]
    turns = others.assign(turn=others.groupby("label").cumcount()).sort_values(["turn", "label"]).index
    shown = [*normal[: NUM_SHOWN // 2], *turns[: NUM_SHOWN // 2]]

    def read(positions: Sequence[int]) -> Pixels:
        return torch.from_numpy(prepared.images[rows[list(positions)]]).permute(0, 3, 1, 2)

    return Images(table, shown, read)


def _open_files(source: Path, geometry: Geometry) -> Images:
    """One image, or all in a folder; those that are shown are evenly spaced in the order of their names."""
    paths = [source]
    if not source.is_file():
        paths = [source / path for path in list_images(source, "unlabelled").rows["path"]]
    shown = np.unique(np.linspace(0, len(paths) - 1, NUM_SHOWN).round().astype(int)).tolist()

    def read(positions: Sequence[int]) -> Pixels:
        pixels = np.stack([read_image(paths[position], geometry) for position in positions])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    return Images(pd.DataFrame({"image": [path.as_posix() for path in paths]}), shown, read)


@torch.inference_mode()
def _embed(detector: Detector, images: Images) -> pd.Series:
    """A vector an image."""
    batches = torch.arange(len(images.table)).split(BATCH_SIZE)
    parts = [detector.embed(images.read(batch.tolist()).to(detector.device)).cpu() for batch in batches]
    return pd.Series(list(torch.cat(parts).numpy()))


@torch.inference_mode()
def rebuild(detector: Autoencoder, pixels: Pixels) -> Rows:
    """Images as the network sees them and their reconstructions, by name, in the order to show them; in [0, 1].

    A denoising autoencoder also shows what it was trained on: corrupted images, the same each time, and what it makes
    of them.
    """
    originals, reconstructions = detector.reconstruct(pixels.to(detector.device))
    rows = {"original": originals}
    if isinstance(detector, DenoisingAutoencoder):
        torch.manual_seed(0)
        rows["corrupted"] = detector.corrupt(originals)
        rows["corrupted, rebuilt"] = detector.decoder(detector.encode(rows["corrupted"]))
    rows["reconstruction"] = reconstructions
    return {name: images.permute(0, 2, 3, 1).cpu().numpy() for name, images in rows.items()}


def draw_reconstructions(
    rows: Rows, maps: Float[np.ndarray, "num_images map_height map_width"], titles: Sequence[str]
) -> Figure:
    """A column an image, and under it its error on a scale that all share."""
    figure = Figure(figsize=(1.6 * len(titles) + 0.6, 1.7 * (len(rows) + 1) + 0.4), layout="constrained", dpi=110)
    axes = figure.subplots(len(rows) + 1, len(titles), squeeze=False)
    top = float(np.quantile(maps, 0.995)) or 1.0
    for column, title in enumerate(titles):
        for row, images in enumerate(rows.values()):
            axes[row, column].imshow(images[column].squeeze(), cmap="gray", vmin=0, vmax=1)
        axes[-1, column].imshow(maps[column], cmap="inferno", vmin=0, vmax=top)
        axes[0, column].set_title(title, fontsize=7, parse_math=False)
    for row, name in enumerate((*rows, "error")):
        axes[row, 0].set_ylabel(name, fontsize=9)
    for one in axes.flat:
        one.set_xticks([])
        one.set_yticks([])
    figure.supxlabel(f"above: name and anomaly score; error: 0 is black, {top:.2g} and more is yellow", fontsize=9)
    return figure


def _shorten(name: str) -> str:
    """The end of a long name."""
    return name if len(name) <= 22 else f"…{name[-21:]}"


def _save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG whole: a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    figure.savefig(unfinished, format="png")
    unfinished.replace(path)
