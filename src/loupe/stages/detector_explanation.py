"""The pictures that explain a detector: its worst misses and false alarms, a fixed sample, and all images by score."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8

from loupe.data.prepare import Prepared
from loupe.evaluation.detection import Scored, choose_fixed_sample, find_worst_false_alarms, find_worst_misses
from loupe.evaluation.pictures import DisplayScale, HeatMap, choose_display_scale
from loupe.models.detectors.base import Detector, detect

MOST_THUMBNAILS = 200
CAPTION = 20  # characters of a label that fit above a column

Positions = Int64[np.ndarray, " num_chosen"]


class Example(NamedTuple):
    """One test image; `heat` is None where its map is not shown."""

    path: str
    label: str
    score: float
    is_anomalous: bool
    image: UInt8[np.ndarray, "height width channels"]
    heat: HeatMap | None


@dataclass(frozen=True)
class Explanation:
    """All maps are on one scale. `thumbnails` are of test images without their maps, the highest score first."""

    scale: DisplayScale
    fixed_sample: list[Example]
    worst_misses: list[Example]
    worst_false_alarms: list[Example]
    thumbnails: list[Example]


def compute_in_batches(
    detector: Detector, prepared: Prepared, rows: Int64[np.ndarray, " num_images"], keeps_map: np.ndarray
) -> tuple[Float[np.ndarray, " num_images"], Float[np.ndarray, "num_kept height width"]]:
    """Raw scores of prepared images, and the maps of those to keep, some images at a time: maps are large."""
    maps = np.empty((int(keeps_map.sum()), prepared.geometry.height, prepared.geometry.width), np.float32)
    scores, num_kept, num_done = [np.zeros(0)], 0, 0
    for batch in prepared.read_batches(rows):
        found, drawn = detect(detector, torch.from_numpy(batch), len(batch))
        kept = drawn.numpy()[keeps_map[num_done : num_done + len(batch)]]
        num_done += len(batch)
        maps[num_kept : num_kept + len(kept)] = kept
        num_kept += len(kept)
        scores.append(found.numpy().astype(np.float64))
    return np.concatenate(scores), maps


def explain_detector(
    detector: Detector, prepared: Prepared, rows: Int64[np.ndarray, " num_images"], test: Scored, num_pictures: int
) -> Explanation:
    """Choose the test images that tell most, and draw their maps.

    Args:
        rows: where the images of `test` stand among the prepared ones.
        num_pictures: how many misses, false alarms and images of the fixed sample at most.
    """
    index = prepared.index.iloc[rows]
    chosen = [
        choose_fixed_sample(list(index["image_id"]), test.labels, num_pictures),
        find_worst_misses(test, num_pictures),
        find_worst_false_alarms(test, num_pictures),
    ]
    pictured = np.unique(np.concatenate(chosen))
    _, maps = compute_in_batches(detector, prepared, rows[pictured], np.ones(len(pictured), bool))
    scale = choose_display_scale(maps)
    heats = {int(position): scale.apply(one) for position, one in zip(pictured, maps, strict=True)}
    sample, misses, alarms = (
        [_build_example(prepared, rows, test, int(position), heats[int(position)]) for position in positions]
        for positions in chosen
    )
    thumbnails = choose_thumbnails(test.scores, pictured)
    return Explanation(
        scale=scale,
        fixed_sample=sample,
        worst_misses=misses,
        worst_false_alarms=alarms,
        thumbnails=[_build_example(prepared, rows, test, int(position)) for position in thumbnails],
    )


def _build_example(
    prepared: Prepared,
    rows: Int64[np.ndarray, " num_images"],
    test: Scored,
    position: int,
    heat: Float[np.ndarray, "height width"] | None = None,
) -> Example:
    row, label, score = rows[position], test.labels[position], float(test.scores[position])
    image, mask_row = np.asarray(prepared.images[row]), prepared.index["mask_row"].iloc[row]
    mask = prepared.masks[mask_row] if mask_row >= 0 else None
    return Example(
        path=str(prepared.index["path"].iloc[row]),
        label=label,
        score=score,
        is_anomalous=label != test.normal_label,
        image=image,
        heat=None if heat is None else HeatMap(f"{label[:CAPTION]}\n{score:.4g}", image, heat, mask),
    )


def choose_thumbnails(scores: Float[np.ndarray, " num_images"], always: Positions) -> Positions:
    """Positions of MOST_THUMBNAILS images, if there are so many: those of `always`, and others evenly by rank.

    The highest score comes first.
    """
    order = np.argsort(-scores, kind="stable")
    is_always = np.isin(order, always)
    others, room = np.flatnonzero(~is_always), max(0, MOST_THUMBNAILS - int(is_always.sum()))
    evenly = np.linspace(0, len(others) - 1, min(room, len(others))).round().astype(int)
    is_always[others[evenly]] = True
    chosen: np.ndarray = order[is_always]
    return chosen
