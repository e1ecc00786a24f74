"""Pictures for people: confusion matrix, curves, histogram of scores, heat maps."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from jaxtyping import Float, Int64, UInt8
from matplotlib.figure import Figure
from PIL import Image

from loupe.evaluation.calibration import Coverage, Reliability

RED, BLUE, GREY = "#c0392b", "#2c6fbb", "#777777"
KIND_COLORS = (RED, "#d98e04", "#6b4fa0", "#2b7549", "#b0477e", "#5c5c5c", "#8a5a2b", "#148f8f")
MOST_KINDS = len(KIND_COLORS)  # lines in a histogram that can be told apart
OTHER_KINDS = "of other kinds"
COUNTED_LABELS, NAMED_LABELS = 30, 100  # of more labels a confusion has no counts, and no names
HEAT_SIDE = 192  # pixels; a smaller image is enlarged by a whole factor, so that its heat is smooth
STRONGEST_HEAT = 0.7  # how much of the image it covers, in [0, 1]
TOP_QUANTILE = 0.995  # of the values of anomaly maps, shown as the highest: single pixels stand out too far


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


class DisplayScale(NamedTuple):
    """Which values of anomaly maps are shown as 0 and 1. It serves the eye alone: no figure is of scaled values."""

    low: float
    high: float

    def apply(self, anomaly_map: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
        """To [0, 1]; what lies beyond the ends is shown as they are."""
        shown: np.ndarray = ((anomaly_map - self.low) / (self.high - self.low)).clip(0, 1)
        return shown

    def describe(self) -> str:
        """What stands under pictures."""
        return f"display scale: 0 = {self.low:.3g}, 1 = {self.high:.3g}"


class HeatMap(NamedTuple):
    """One test image with what the detector makes of it; `heat` is on the display scale, `mask` None if not known."""

    title: str
    image: UInt8[np.ndarray, "height width channels"]
    heat: Float[np.ndarray, "height width"]
    mask: UInt8[np.ndarray, "height width"] | None

    def draw_parts(self) -> dict[str, UInt8[np.ndarray, "_height _width _channels"]]:
        """Its pictures by name; a mask that is not known is left out."""
        parts = {
            "original": self.image,
            "anomaly map": color_heat(self.heat),
            "overlay": overlay_heat(self.image, self.heat),
        }
        return parts if self.mask is None else parts | {"mask": self.mask[..., None] * np.uint8(255)}


def choose_display_scale(maps: Float[np.ndarray, "num_images height width"]) -> DisplayScale:
    """From the middle of all values, so that most of an image is dark, nearly to the highest."""
    low, high = np.quantile(maps, [0.5, TOP_QUANTILE]) if maps.size else (0.0, 1.0)
    return DisplayScale(float(low), float(high if high > low else low + 1))


def draw_scores(
    scores: Float[np.ndarray, " num_images"], labels: Sequence[str], normal_label: str, threshold: float
) -> Figure:
    """Histograms of raw anomaly scores with the threshold: normal images filled, each kind of defect as a line.

    Beyond MOST_KINDS the rarer kinds are one.
    """
    figure = Figure(figsize=(7.5, 4.2), layout="constrained", dpi=110)
    axes = figure.add_subplot()
    names = np.asarray(labels, dtype=object)
    kinds = [kind for kind, _ in Counter(name for name in labels if name != normal_label).most_common()]
    if len(kinds) > MOST_KINDS:
        names[np.isin(names, kinds[MOST_KINDS - 1 :])] = OTHER_KINDS
        kinds = [*kinds[: MOST_KINDS - 1], OTHER_KINDS]
    edges = list(np.histogram_bin_edges(scores, bins=50))
    for kind, color in zip([normal_label, *kinds], [BLUE, *KIND_COLORS], strict=False):
        chosen = scores[names == kind]
        style = {"color": color, "alpha": 0.45} if kind == normal_label else {"color": color, "histtype": "step"}
        weights = np.full(len(chosen), 1 / max(len(chosen), 1))
        axes.hist(chosen, edges, weights=weights, label=f"{len(chosen)} {kind}", **style)
    axes.axvline(threshold, color="black", linestyle="--", label=f"threshold {threshold:.3g}")
    axes.set_xlabel("anomaly score (raw)")
    axes.set_ylabel("part of the test images of its kind")
    for text in axes.legend(fontsize=8).get_texts():
        text.set_parse_math(False)
    return figure


def draw_heat_maps(shown: Sequence[HeatMap], scale: DisplayScale) -> Figure:
    """A column an image: what came in, its anomaly map on the display scale, both, and masks where there are any."""
    drawn = [one.draw_parts() for one in shown]
    rows = ["original", "anomaly map", "overlay", *(["mask"] if any("mask" in parts for parts in drawn) else [])]
    figure = Figure(figsize=(1.6 * max(len(shown), 3) + 0.6, 1.8 * len(rows)), layout="constrained", dpi=110)
    axes = figure.subplots(len(rows), max(len(shown), 1), squeeze=False)
    for column, (one, parts) in enumerate(zip(shown, drawn, strict=True)):
        for row, name in enumerate(rows):
            if name in parts:
                axes[row, column].imshow(parts[name].squeeze(), cmap="gray", vmin=0, vmax=255)
            else:
                axes[row, column].text(0.5, 0.5, "no mask", ha="center", va="center", fontsize=8)
        axes[0, column].set_title(one.title, fontsize=8, parse_math=False)
    for row, name in enumerate(rows):
        axes[row, 0].set_ylabel(name, fontsize=9)
    for one in axes.flat:
        one.set_xticks([])
        one.set_yticks([])
    figure.supxlabel(scale.describe() if shown else "there are no such images", fontsize=9)
    return figure


def find_best_epoch(history: pd.DataFrame) -> int:
    """The row that training kept: a classifier is judged at its best temperature, others by the plain loss."""
    column = "val/calibrated_loss" if "val/calibrated_loss" in history else "val/loss"
    return int(history[column].argmin())  # pandas passes over epochs whose loss is no number


def draw_history(history: pd.DataFrame) -> Figure:
    """Train and val loss by epoch, the best epoch marked; val accuracy beside them where there is one."""
    has_accuracy = "val/accuracy" in history
    figure = Figure(figsize=(10 if has_accuracy else 5.5, 3.8), layout="constrained", dpi=110)
    axes = figure.subplots(1, 2 if has_accuracy else 1, squeeze=False)[0]
    for name, color in (("train/loss", GREY), ("val/loss", BLUE)):
        axes[0].plot(history["epoch"], history[name], color=color, label=name)
    axes[0].axvline(
        history["epoch"].to_numpy()[find_best_epoch(history)],
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
    colors = color_heat(smooth)
    covered = STRONGEST_HEAT * smooth[..., None]
    shown: np.ndarray = (grey * (1 - covered) + colors * covered).round().astype(np.uint8)
    return shown


def color_heat(heat: Float[np.ndarray, "height width"]) -> UInt8[np.ndarray, "height width 3"]:
    """A map in [0, 1] as a picture, from black through purple and orange to yellow."""
    colors: np.ndarray = (matplotlib.colormaps["inferno"](heat)[..., :3] * 255).round().astype(np.uint8)
    return colors
