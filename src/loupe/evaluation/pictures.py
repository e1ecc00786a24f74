"""Pictures for people: confusion matrix, curves, histogram of scores, heat maps."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import pandas as pd
from jaxtyping import Float, Int64, UInt8
from matplotlib.figure import Figure
from PIL import Image

from loupe.evaluation.calibration import Coverage, Reliability

RED, BLUE, GREY = "#c0392b", "#2c6fbb", "#777777"
COUNTED_LABELS, NAMED_LABELS = 30, 100  # of more labels a confusion has no counts, and no names
HEAT_SIDE = 192  # pixels; a smaller image is enlarged by a whole factor, so that its heat is smooth
STRONGEST_HEAT = 0.7  # how much of the image it covers, in [0, 1]


def draw_confusion(counts: Int64[np.ndarray, "num_labels num_labels"], labels: Sequence[str]) -> Figure:
    """A row a true label, shaded by the part of that row."""
    side = min(18.0, max(4.5, 0.55 * len(labels) + 2))
    size = min(10.0, 480 / len(labels))
    figure = Figure(figsize=(side, side), layout="constrained", dpi=110)
    axes = figure.add_subplot()
    parts = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(parts, cmap="Blues", vmin=0, vmax=1)
    named = labels if len(labels) <= NAMED_LABELS else []
    axes.set_xticks(range(len(named)), named, rotation=60, ha="right", parse_math=False, fontsize=size)
    axes.set_yticks(range(len(named)), named, parse_math=False, fontsize=size)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(labels) <= COUNTED_LABELS:
        for row, column in zip(*np.nonzero(counts), strict=True):
            axes.text(
                column,
                row,
                str(counts[row, column]),
                ha="center",
                va="center",
                fontsize=8,
                color="white" if parts[row, column] > 0.5 else "black",
            )
    return figure


def draw_scores(
    scores: Float[np.ndarray, " num_images"], labels: Sequence[str], normal_label: str, threshold: float
) -> Figure:
    """Histogram of raw anomaly scores, normal images against anomalous ones, with the threshold."""
    figure = Figure(figsize=(7, 4), layout="constrained", dpi=110)
    axes = figure.add_subplot()
    is_normal = np.asarray(labels) == normal_label
    edges = list(np.histogram_bin_edges(scores, bins=50))
    for kind, chosen, color in (("normal", is_normal, BLUE), ("anomalous", ~is_normal, RED)):
        weights = np.full(chosen.sum(), 1 / max(chosen.sum(), 1))
        axes.hist(scores[chosen], edges, weights=weights, color=color, alpha=0.6, label=f"{kind} ({chosen.sum()})")
    axes.axvline(threshold, color="black", linestyle="--", label=f"threshold {threshold:.3g}")
    axes.set_xlabel("anomaly score (raw)")
    axes.set_ylabel("part of the test images of its kind")
    axes.legend()
    return figure


def draw_heat_maps(
    images: UInt8[np.ndarray, "num_images height width channels"],
    reconstructions: Float[np.ndarray, "num_images input_height input_width channels"],
    maps: Float[np.ndarray, "num_images height width"],
    titles: Sequence[str],
) -> Figure:
    """A column an image: what came in, what was rebuilt, and the map of errors on one common scale."""
    figure = Figure(figsize=(1.6 * len(images) + 0.6, 5.2), layout="constrained", dpi=110)
    axes = figure.subplots(3, len(images), squeeze=False)
    top = float(np.quantile(maps, 0.995)) or 1.0
    for column, title in enumerate(titles):
        axes[0, column].imshow(images[column].squeeze(), cmap="gray", vmin=0, vmax=255)
        axes[1, column].imshow(reconstructions[column].squeeze(), cmap="gray", vmin=0, vmax=1)
        axes[2, column].imshow(maps[column], cmap="inferno", vmin=0, vmax=top)
        axes[0, column].set_title(title, fontsize=8, parse_math=False)
    for row, name in enumerate(("original", "reconstruction", "anomaly map")):
        axes[row, 0].set_ylabel(name, fontsize=9)
    for one in axes.flat:
        one.set_xticks([])
        one.set_yticks([])
    return figure


def draw_history(history: pd.DataFrame) -> Figure:
    """Train and val loss by epoch, the best epoch marked; val accuracy beside them where there is one."""
    has_accuracy = "val/accuracy" in history
    figure = Figure(figsize=(10 if has_accuracy else 5.5, 3.8), layout="constrained", dpi=110)
    axes = figure.subplots(1, 2 if has_accuracy else 1, squeeze=False)[0]
    for name, color in (("train/loss", GREY), ("val/loss", BLUE)):
        axes[0].plot(history["epoch"], history[name], color=color, label=name)
    axes[0].axvline(
        history["epoch"].to_numpy()[history["val/loss"].to_numpy().argmin()],
        color=RED,
        linestyle=":",
        label="best epoch",
    )
    axes[0].set_ylabel("loss")
    if has_accuracy:
        axes[1].plot(history["epoch"], history["val/accuracy"], color=BLUE, label="val/accuracy")
        axes[1].set_ylabel("accuracy")
    for one in axes:
        one.set_xlabel("epoch")
        one.legend()
    return figure


def draw_reliability(diagrams: Mapping[str, Reliability]) -> Figure:
    """Accuracy against confidence by bins, a line a diagram; the larger a dot, the more images it stands for."""
    figure = Figure(figsize=(4.8, 4.8), layout="constrained", dpi=110)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="as sure as it is right")
    for (name, diagram), color in zip(diagrams.items(), (BLUE, RED), strict=False):
        filled = diagram.counts > 0
        confidence, accuracy, counts = (
            values[filled] for values in (diagram.confidence, diagram.accuracy, diagram.counts)
        )
        axes.plot(confidence, accuracy, color=color, label=name)
        axes.scatter(confidence, accuracy, 12 + 200 * counts / counts.sum(), color=color, alpha=0.6)
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy")
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.legend()
    return figure


def draw_coverage(coverage: Coverage) -> Figure:
    """How right the surest images are, against how many of them are kept."""
    figure = Figure(figsize=(5.5, 3.8), layout="constrained", dpi=110)
    axes = figure.add_subplot()
    axes.plot(coverage.coverage, coverage.accuracy, color=BLUE, marker="." if len(coverage.coverage) <= 30 else None)
    axes.set_xlabel("part of the images that is kept, the surest first")
    axes.set_ylabel("accuracy among them")
    axes.set_xlim(0, 1.02)
    return figure


def overlay_heat(
    image: UInt8[np.ndarray, "height width channels"], heat: Float[np.ndarray, "map_height map_width"]
) -> UInt8[np.ndarray, "shown_height shown_width 3"]:
    """A grey copy of an image under a map that covers it, from nothing where the map is 0 to yellow where it is 1.

    A small image is enlarged by a whole factor.
    """
    factor = max(1, HEAT_SIDE // max(image.shape[:2]))
    grey = image.mean(axis=2).repeat(factor, axis=0).repeat(factor, axis=1)[..., None]
    size = (grey.shape[1], grey.shape[0])
    smooth = np.asarray(Image.fromarray(heat.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    colors = matplotlib.colormaps["inferno"](smooth)[..., :3] * 255
    covered = STRONGEST_HEAT * smooth[..., None]
    shown: np.ndarray = (grey * (1 - covered) + colors * covered).round().astype(np.uint8)
    return shown
