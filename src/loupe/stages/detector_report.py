"""The page on a detector, reports/detector.html, and the pictures that are files."""

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from PIL import Image

from loupe.data.prepare import Prepared
from loupe.evaluation.detection import DetectorJudgement, Scored
from loupe.evaluation.pictures import draw_heat_maps, draw_history, draw_scores, find_best_epoch
from loupe.evaluation.thresholds import to_percent
from loupe.models.detectors.tiling import TiledDetector
from loupe.reporting.charts import Chart, Line, ScoreChart, build_chart, build_score_chart
from loupe.reporting.page import embed_picture, render_page
from loupe.stages.detector_explanation import Explanation

PART_SIDE, THUMBNAIL_SIDE = 224, 88  # pixels
UNLIKELY = 0.01  # a chance below which so many false alarms are no accident
SPLITS = {"train": "to fit to", "val": "to watch the fit", "calibration": "for the threshold", "test": "to test on"}

Row = dict[Hashable, Any]


@dataclass(frozen=True)
class Report:
    """What the page and the pictures show; `facts` are names and values of how the detector was made."""

    name: str
    facts: list[tuple[str, str]]
    history: pd.DataFrame | None
    test: Scored
    calibration_scores: Float[np.ndarray, " num_calibration"]
    judgement: DetectorJudgement
    explanation: Explanation


def describe_detector(config: Mapping[str, Any], prepared: Prepared, seed: int) -> list[tuple[str, str]]:
    """What was fitted to what: names and values, from the model's own config and the prepared images."""
    geometry = prepared.geometry
    counts = [f"{len(prepared.rows_of(split)):,} {purpose}" for split, purpose in SPLITS.items()]
    channels = f"{geometry.channels} channel{'s' * (geometry.channels > 1)}"
    best_epoch = config.get("best_epoch")
    name, tiles, size = config["detector"], None, (geometry.input_height, geometry.input_width)
    if name == TiledDetector.name:
        grid = config["config"]
        name, (height, width), size = grid["detector"], grid["inner"]["crop"], grid["inner"]["size"]
        tiles = f"{grid['rows']} × {grid['columns']}, each of {height} × {width} pixels and looked at by itself"
    facts = [
        ("detector", str(name).replace("_", " ")),
        ("tiles", tiles),
        ("backbone", _find_backbone(config)),
        ("its weights", config.get("weights")),
        ("fitted to", f"images of {config['normal_label']} alone"),
        ("images", ", ".join(counts)),
        ("what it sees", f"{size[0]} × {size[1]} pixels in {channels}"),
        ("how it comes to that", f"{geometry.fit} to {geometry.height} × {geometry.width}"),
        ("best epoch", f"{best_epoch}, which has the least loss on val" if best_epoch else None),
        ("seed", str(seed)),
    ]
    return [(name, str(value)) for name, value in facts if value]


def _find_backbone(config: Mapping[str, Any]) -> str | None:
    """That of the detector, or of the detector of its tiles."""
    values = config.get("config", {})
    backbone: str | None = values.get("backbone") or (values.get("inner") or {}).get("backbone")
    return backbone


def save_pictures(report: Report, folder: Path) -> dict[str, Path]:
    """Draw PNG files, each named as its key; `heat_maps` is the fixed sample, `history` only where there is one."""
    test, explanation = report.test, report.explanation
    shown = {
        "heat_maps": explanation.fixed_sample,
        "worst_misses": explanation.worst_misses,
        "worst_false_alarms": explanation.worst_false_alarms,
    }
    figures = {"scores": draw_scores(test.scores, test.labels, test.normal_label, report.judgement.threshold.value)}
    for name, examples in shown.items():
        figures[name] = draw_heat_maps([one.heat for one in examples if one.heat is not None], explanation.scale)
    if report.history is not None:
        figures["history"] = draw_history(report.history)
    paths = {name: folder / f"{name}.png" for name in figures}
    for name, figure in figures.items():
        figure.savefig(paths[name])
    return paths


def render_report(report: Report) -> str:
    """The page."""
    judgement, scores = report.judgement, _chart_scores(report)
    kinds: list[Row] = judgement.kinds.astype(object).where(judgement.kinds.notna(), None).to_dict("records")
    return render_page(
        "detector.html.jinja",
        {
            "report": report,
            "verdict": _judge(judgement),
            "measures": _list_measures(judgement),
            "scores": scores,
            "kinds": kinds,
            "learning": _chart_history(report.history),
            "told": _tell(report, scores),
            "embed": {"large": _build_embed(PART_SIDE), "small": _build_embed(THUMBNAIL_SIDE)},
        },
    )


def _build_embed(side: int) -> Callable[[np.ndarray], str]:
    def embed(pixels: np.ndarray) -> str:
        return embed_picture(Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels), side)

    return embed


def _judge(told: DetectorJudgement) -> tuple[str, str]:
    """The result in a sentence or two, and its mark: a warning where there is a doubt."""
    num_normal, counts = told.num_images - told.num_anomalous, []
    if told.num_anomalous:
        num_found = round((1 - told.figures["miss_rate"]) * told.num_anomalous)
        counts.append(f"{num_found:,} of {told.num_anomalous:,} anomalous test images are found")
    if num_normal:
        num_alarms = round(told.figures["false_alarm_rate"] * num_normal)
        counts.append(f"{num_alarms:,} of {num_normal:,} normal ones {'is' if num_alarms == 1 else 'are'} flagged")
    promise = f"at a threshold that promises {to_percent(told.threshold.rate)} of false alarms."
    doubts = _list_doubts(told)
    return " ".join([f"{', and '.join(counts)}, {promise}", *doubts]), "warning" if doubts else "ok"


def _list_doubts(told: DetectorJudgement) -> list[str]:
    doubts = []
    if not told.num_anomalous:
        doubts.append("There are no anomalous test images: how many defects it finds is not known.")
    elif told.figures["miss_rate"] > 0.5:
        doubts.append("More defects are missed than found.")
    if "image_auroc" in told.intervals and told.intervals["image_auroc"].low <= 0.5:
        doubts.append("It does not rank anomalous images clearly better than chance.")
    if told.chance_of_alarms is not None and told.chance_of_alarms < UNLIKELY:
        doubts.append("So many false alarms were not promised: the normal test images are unlike those of calibration.")
    return doubts


def _list_measures(told: DetectorJudgement) -> list[Row]:
    """The headline figures with what they mean, the interval where there is one."""
    num_normal, figures = told.num_images - told.num_anomalous, told.figures
    alarms = f"of {num_normal:,} normal images are flagged"
    misses = f"of {told.num_anomalous:,} anomalous images are not"
    over_pixels = f"over the pixels of {told.num_pixel_images:,} images"
    meanings = {
        "image_auroc": ("image AUROC", "1 at best, 0.5 by chance"),
        "image_average_precision": ("image average precision", "1 at best"),
        "false_alarm_rate": ("false alarms", alarms),
        "miss_rate": ("misses", misses),
        "f1": ("F1", f"1 at best; {figures['best_f1']:.3f} at the best of all thresholds"),
        "pixel_auroc": ("pixel AUROC", over_pixels),
        "pixel_average_precision": ("pixel average precision", over_pixels),
        "aupro": ("AUPRO", "each defect counts alike, up to 30% of false alarms"),
    }
    return [
        {
            "name": name,
            "meaning": meaning,
            "value": figures[key],
            "interval": told.intervals.get(key),
            "is_part": key.endswith("rate"),
        }
        for key, (name, meaning) in meanings.items()
        if not math.isnan(figures.get(key, math.nan))
    ]


def _chart_scores(report: Report) -> ScoreChart:
    scores, is_anomalous = report.test.scores, report.test.is_anomalous
    also = np.array([report.judgement.threshold.value, *report.calibration_scores])
    return build_score_chart(
        "scores of normal and of anomalous test images",
        ("normal", "anomalous"),
        scores[~is_anomalous],
        scores[is_anomalous],
        also,
    )


def _chart_history(history: pd.DataFrame | None) -> list[Chart]:
    """Loss of train and val; nothing where there was no training in epochs."""
    if history is None:
        return []
    epochs, losses = history["epoch"].to_numpy(np.float64), history["val/loss"].to_numpy(np.float64)
    lines = [
        Line("train", "second", epochs, history["train/loss"].to_numpy(np.float64)),
        Line("val", "first", epochs, losses),
    ]
    mark = (float(epochs[find_best_epoch(history)]), "best epoch")
    return [build_chart("loss by epoch", ("epoch", "loss"), lines, whole_x=True, mark=mark)]


def _tell(report: Report, scores: ScoreChart) -> dict[str, Any]:
    """What the page's script counts on: all test scores, the kind of each (-1 where normal), calibration scores."""
    kinds = list(report.judgement.kinds["kind"])
    places = {kind: place for place, kind in enumerate(kinds)}
    return {
        "threshold": report.judgement.threshold.value,
        "scores": report.test.scores.tolist(),
        "kind": [places.get(label, -1) for label in report.test.labels],
        "kinds": [int(number) for number in report.judgement.kinds["num_images"]],
        "calibration": np.sort(report.calibration_scores)[::-1].tolist(),
        "chart": {key: getattr(scores, key) for key in ("low", "high", "left", "right", "width")},
    }
