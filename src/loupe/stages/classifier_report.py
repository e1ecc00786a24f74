"""The page on a classifier, reports/classifier.html, and the same pictures as files."""

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from loupe.data.prepare import Prepared
from loupe.data.sheets import draw_captioned
from loupe.evaluation.judgement import Judgement
from loupe.evaluation.pictures import draw_confusion, draw_coverage, draw_history, draw_reliability, find_best_epoch
from loupe.models.classifiers import ClassifierConfig
from loupe.reporting.charts import Chart, Line, build_chart
from loupe.reporting.page import embed_picture, render_page
from loupe.stages.classifier_explanation import Example, Explanation

MOST_LABELS = 60  # rows of the table of labels; the page says how many more there are
MOST_CELLS = 30  # labels whose confusion is a table; of more it is a picture
EXAMPLE_SIDE, SMALL_SIDE, TILE_SIDE, PICTURE_SIDE = 256, 128, 72, 1400  # pixels
CAPTION = 20  # characters of a label that fit under a picture
FEW_IMAGES = 100  # to calibrate on: fewer than seven to each of 15 bins
KEPT = (1.0, 0.9, 0.75, 0.5)
SPLITS = {"train": "to train on", "val": "to judge by", "calibration": "to calibrate on", "test": "to test on"}

Row = dict[Hashable, Any]


@dataclass(frozen=True)
class Report:
    """What the page and the pictures show; `facts` are names and values of how the classifier was made."""

    name: str
    labels: list[str]
    facts: list[tuple[str, str]]
    history: pd.DataFrame
    judgement: Judgement
    explanation: Explanation


def describe_training(
    config: Mapping[str, Any], network: ClassifierConfig, prepared: Prepared, last_epoch_accuracy: float
) -> list[tuple[str, str]]:
    """What was trained on what: names and values, from the model's own config and the prepared images."""
    geometry = prepared.geometry
    purposes = SPLITS | ({"val": "to judge by, then to train on"} if config["learnt_from_val"] else {})
    counts = [f"{len(prepared.rows_of(split)):,} {purpose}" for split, purpose in purposes.items()]
    sides = [f"{height} × {width}" for height, width in (network.size, network.crop, (geometry.height, geometry.width))]
    facts = [
        ("network", network.backbone),
        ("weights before training", config["weights"]),
        ("recipe", config.get("recipe", "").replace("_", " ")),
        ("images", "; ".join(counts)),
        ("what the network sees", f"{sides[0]} pixels in {network.channels} channel{'s' * (network.channels > 1)}"),
        (
            "how it comes to that",
            f"{geometry.fit} to {sides[2]}"
            + f", the centre of {sides[1]}" * (sides[1] != sides[2])
            + f", resized to {sides[0]}" * (sides[0] != sides[1]),
        ),
        (
            "best epoch",
            f"{config['best_epoch']}, which has the least loss on val at its best temperature"
            + "; then all epochs were trained again, on the images of val too" * config["refitted"],
        ),
        (
            "last epoch",
            f"right on {last_epoch_accuracy:.1%} of the test images"
            + ", before all were trained again" * config["refitted"],
        ),
    ]
    return [fact for fact in facts if fact[1]]


def save_pictures(report: Report, folder: Path) -> dict[str, Path]:
    """Draw PNG files, each named as its key.

    Without a convolution there are no filters and responses; of a head that was fitted at once there is no history.
    """
    told, explanation = report.judgement, report.explanation
    pairs = [example for pair in explanation.pairs for side in pair for example in side.examples]
    figures = {
        "confusion": draw_confusion(told.confusion, report.labels),
        "reliability": draw_reliability(_name_diagrams(told)),
        "coverage": draw_coverage(told.coverage),
    }
    if len(report.history) > 1:
        figures["history"] = draw_history(report.history)
    sheets = {
        "most_wrong": _draw_examples(explanation.most_wrong),
        "most_uncertain": _draw_examples(explanation.most_uncertain),
        "confused_pairs": _draw_examples(pairs),
    }
    if explanation.filters is not None and explanation.responses is not None:
        sheets |= {"filters": _draw_tiles(explanation.filters), "responses": _draw_tiles(explanation.responses)}
    paths = {name: folder / f"{name}.png" for name in (*figures, *sheets)}
    for name, figure in figures.items():
        figure.savefig(paths[name])
    for name, sheet in sheets.items():
        sheet.save(paths[name])
    return paths


def render_report(report: Report, pictures: Mapping[str, Path]) -> str:
    """The page. `pictures` are those of `save_pictures`; of many labels, it embeds the confusion."""
    told, labels = report.judgement, report.labels
    as_table = len(labels) <= MOST_CELLS
    return render_page(
        "classifier.html.jinja",
        {
            "report": report,
            "figures": told.figures,
            "verdict": _judge(told),
            "measures": _list_measures(told),
            "few_images": FEW_IMAGES,
            "learning": _chart_history(report.history),
            "classes": _list_classes(told, labels),
            "num_more_classes": max(0, len(labels) - MOST_LABELS),
            "confusion": _list_confusion(told, labels) if as_table else None,
            "confusion_picture": None if as_table else embed_picture(Image.open(pictures["confusion"]), PICTURE_SIDE),
            "reliability": _chart_reliability(told),
            "mean_confidence": _compute_mean_confidence(told),
            "coverage": _chart_coverage(told),
            "kept": _list_kept(told),
            "embed": {
                "large": _build_embed(EXAMPLE_SIDE),
                "small": _build_embed(SMALL_SIDE),
                "tile": _build_embed(TILE_SIDE),
            },
        },
    )


def _build_embed(side: int) -> Callable[[np.ndarray], str]:
    return lambda pixels: embed_picture(_to_picture(pixels), side)


def _name_diagrams(told: Judgement) -> dict[str, Any]:
    return {"as it is": told.reliability} | ({} if told.scaled is None else {"temperature scaled": told.scaled})


def _draw_examples(examples: list[Example]) -> Image.Image:
    """Each image under its true and its predicted label, its heat map beside it where there is one."""
    pictures, captions = [], []
    for example in examples:
        pictures.append(_to_picture(example.image))
        captions.append(f"{example.label[:CAPTION]}\nseen as {example.predicted[:CAPTION]}")
        if example.heat is not None:
            pictures.append(_to_picture(example.heat))
            captions.append("where it looked")
    return draw_captioned(pictures, captions)


def _draw_tiles(tiles: np.ndarray) -> Image.Image:
    return draw_captioned(
        [_to_picture(tile) for tile in tiles], [str(number) for number in range(1, len(tiles) + 1)], 8
    )


def _to_picture(pixels: np.ndarray) -> Image.Image:
    """A tiny one is enlarged by a whole factor, so that its pixels are seen as they are."""
    factor = max(1, SMALL_SIDE // max(pixels.shape[:2]))
    enlarged = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    return Image.fromarray(enlarged.squeeze(-1) if enlarged.shape[-1] == 1 else enlarged)


def _judge(told: Judgement) -> tuple[str, str]:
    """The result in a sentence or two, and its mark: a warning where the commonest label alone might do as well."""
    num_images, interval = int(told.confusion.sum()), told.intervals["accuracy"]
    commonest = told.confusion.sum(axis=1).max() / num_images
    right = int(told.confusion.trace())
    sentence = (
        f"{right:,} of {num_images:,} test images are classified rightly, {told.figures['accuracy']:.1%}; on other "
        f"images of the same kind it might have been {interval.low:.1%} to {interval.high:.1%}."
    )
    if right == num_images:
        sentence += f" No error among so many still allows up to {min(1.0, 3 / num_images):.1%} of errors."
    guess = f" Always answering with the commonest label would be right on {commonest:.1%}"
    if interval.low > commonest:
        return f"{sentence}{guess}.", "ok"
    return f"{sentence}{guess}, which is not clearly worse.", "warning"


def _list_measures(told: Judgement) -> list[Row]:
    """The headline figures with what they mean, the interval where there is one."""
    meanings = {
        "accuracy": ("accuracy", "of the images are right"),
        "balanced_accuracy": ("balanced accuracy", "the same if each label were as frequent"),
        "macro_f1": ("macro F1", "mean over labels, 1 at best"),
        "log_loss": ("log loss", "0 at best; guessing evenly has " + f"{math.log(len(told.confusion)):.2f}"),
        "top_3_accuracy": ("top-3 accuracy", "have their label among the three likeliest"),
        "calibration_error": ("calibration error", "between what it claims and what it holds"),
    }
    return [
        {
            "name": name,
            "meaning": meaning,
            "value": told.figures[key],
            "interval": told.intervals.get(key),
            "is_part": "accuracy" in key,
        }
        for key, (name, meaning) in meanings.items()
        if not math.isnan(told.figures[key])
    ]


def _list_classes(told: Judgement, labels: list[str]) -> list[Row]:
    """The labels with the lowest F1 first, those without any last; what is not defined is None."""
    table = told.classes.assign(label=labels).sort_values("f1", kind="stable", na_position="last").head(MOST_LABELS)
    rows: list[Row] = table.astype(object).where(table.notna(), None).to_dict("records")
    return rows


def _list_confusion(told: Judgement, labels: list[str]) -> list[Row]:
    """A row a true label; a cell's `strength` in [0, 1] is the root of its part of the row: rare errors show."""
    return [
        {
            "label": label,
            "total": int(counts.sum()),
            "cells": [
                {"label": labels[column], "count": int(count), "strength": math.sqrt(count / max(1, counts.sum()))}
                for column, count in enumerate(counts)
            ],
        }
        for label, counts in zip(labels, told.confusion, strict=True)
    ]


def _chart_history(history: pd.DataFrame) -> list[Chart]:
    """Loss of train and val; accuracy on val where it was measured. A single epoch is no curve."""
    if len(history) < 2:
        return []
    epochs = history["epoch"].to_numpy(np.float64)
    best = float(epochs[find_best_epoch(history)])
    charts = {
        "loss": [("train", "train/loss", "second"), ("val", "val/loss", "first")],
        "accuracy": [("val", "val/accuracy", "first")],
    }
    return [
        build_chart(
            f"{what} by epoch",
            ("epoch", what),
            [Line(name, tone, epochs, history[column].to_numpy(np.float64)) for name, column, tone in lines],
            whole_x=True,
            mark=(best, "best epoch"),
        )
        for what, lines in charts.items()
        if all(column in history for _, column, _ in lines)
    ]


def _chart_reliability(told: Judgement) -> Chart:
    ideal = np.array([0.0, 1.0])
    lines = [Line("as sure as it is right", "ideal", ideal, ideal, has_dots=False)]
    for (name, diagram), tone in zip(_name_diagrams(told).items(), ("first", "third"), strict=False):
        filled = diagram.counts > 0
        weights = diagram.counts[filled] / diagram.counts.max()
        lines.append(Line(name, tone, diagram.confidence[filled], diagram.accuracy[filled], weights))
    return build_chart(
        "accuracy against confidence", ("confidence", "accuracy"), lines, x_range=(0.0, 1.0), y_range=(0.0, 1.0)
    )


def _compute_mean_confidence(told: Judgement) -> float:
    counts, confidence, _ = told.reliability
    filled = counts > 0
    return float(np.average(confidence[filled], weights=counts[filled]))


def _chart_coverage(told: Judgement) -> Chart:
    line = Line("accuracy", "first", told.coverage.coverage, told.coverage.accuracy)
    return build_chart("accuracy against coverage", ("part of the images kept", "accuracy"), [line], x_range=(0.0, 1.0))


def _list_kept(told: Judgement) -> list[Row]:
    """What is gained where the least sure answers are left out, at some rates; images of one confidence go together."""
    coverage, accuracy, confidence = told.coverage
    places = dict.fromkeys(int(np.searchsorted(coverage, kept - 1e-9)) for kept in KEPT)
    return [
        {"coverage": coverage[place], "accuracy": accuracy[place], "confidence": confidence[place]} for place in places
    ]
