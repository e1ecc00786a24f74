"""How well anomaly maps point at defects: figures over pixels, on raw values; a higher one is more anomalous."""

from functools import partial

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8
from scipy import ndimage

from loupe.evaluation.anomaly import compute_grouped_auroc
from loupe.evaluation.bootstrap import Interval, compute_intervals

LARGEST_RATE = 0.3  # of false alarms among pixels, up to which regions are looked at
NUM_BINS = 1000  # of the histograms that are resampled
PIXELS_AT_ONCE = 1 << 20  # of which counts are made; all together would take twenty times as much as the maps
NEIGHBOURS = np.ones((3, 3), dtype=int)  # pixels that touch at a corner are of one region

Masks = UInt8[np.ndarray, "num_images height width"]
Maps = Float32[np.ndarray, "num_images height width"]
Counts = Float[np.ndarray, "num_images num_bins"]


def compute_pixel_metrics(masks: Masks, maps: Maps) -> dict[str, float]:
    """Pixel AUROC, average precision and AUPRO, all in [0, 1] and exact: no threshold is left out, no value rounded.

    AUPRO is the area under the per-region overlap (how much of a region is flagged, mean over all regions) against the
    rate of false alarms among normal pixels, up to LARGEST_RATE and divided by it (Bergmann et al., "The MVTec Anomaly
    Detection Dataset", International Journal of Computer Vision 129, 2021). Scores that are all alike have half of
    LARGEST_RATE, and not a half.

    Args:
        masks: 1 where anomalous.

    Returns:
        NaN where only one kind of pixel is present.
    """
    is_anomalous = masks > 0
    anomalous, normal = maps[is_anomalous], maps[~is_anomalous]
    if not anomalous.size or not normal.size:
        return dict.fromkeys(("pixel_auroc", "pixel_average_precision", "aupro"), float("nan"))
    normal.sort()
    order = anomalous.argsort()
    anomalous, weights = anomalous[order], _weigh_regions(is_anomalous)[order]
    figures = np.zeros(3)
    for start in range(0, anomalous.size, PIXELS_AT_ONCE):
        figures += _add_up(normal, anomalous, weights, slice(start, start + PIXELS_AT_ONCE))
    rates, precision, overlap = figures
    return {
        "pixel_auroc": float(1 - rates / (2 * anomalous.size)),
        "pixel_average_precision": float(precision / anomalous.size),
        "aupro": float(overlap / LARGEST_RATE),
    }


def _add_up(
    normal: Float32[np.ndarray, " num_normal"],
    anomalous: Float32[np.ndarray, " num_anomalous"],
    weights: Float[np.ndarray, " num_anomalous"],
    part: slice,
) -> Float[np.ndarray, " 3"]:
    """What a part of the anomalous pixels adds to rates of false alarms, to precision and to overlap; all sorted."""
    above = normal.size - np.searchsorted(normal, anomalous[part], side="right")
    at_least = normal.size - np.searchsorted(normal, anomalous[part], side="left")
    hits = anomalous.size - np.searchsorted(anomalous, anomalous[part], side="left")
    low, high = above / normal.size, at_least / normal.size
    sums = (low + high).sum(), (hits / (hits + at_least)).sum(), weights[part] @ _integrate_steps(low, high)
    return np.array(sums)


def _weigh_regions(is_anomalous: Bool[np.ndarray, "num_images height width"]) -> Float[np.ndarray, " num_pixels"]:
    """Of each anomalous pixel, in order: its part of its region, and that of all; they sum to 1."""
    parts, num_regions = [], 0
    for one in is_anomalous:
        regions, number = ndimage.label(one, NEIGHBOURS)
        numbers = regions[one]
        parts.append(1 / np.bincount(numbers)[numbers])
        num_regions += number
    return np.concatenate(parts) / num_regions


def _integrate_steps(
    low: Float[np.ndarray, " num_pixels"], high: Float[np.ndarray, " num_pixels"]
) -> Float[np.ndarray, " num_pixels"]:
    """What each pixel adds to the area up to LARGEST_RATE, by the trapezoidal rule.

    It is not flagged at rates of false alarms up to `low`, and is from `high` on. Between the two, where normal pixels
    tie with it, it counts in part.
    """
    reached = np.clip(LARGEST_RATE - low, 0, high - low)
    ramp = reached**2 / (2 * np.where(high > low, high - low, 1))
    areas: np.ndarray = ramp + np.maximum(LARGEST_RATE - high, 0)
    return areas


def compute_pixel_interval(masks: Masks, maps: Maps, seed: int) -> Interval:
    """The interval of the pixel AUROC by resampling whole images, as the pixels of one are not independent.

    NaN where only one kind of pixel is present.
    """
    if not masks.any() or masks.all():
        return Interval(float("nan"), float("nan"))
    statistic = partial(_compute_resampled_auroc, *count_pixels(masks, maps))
    return compute_intervals(statistic, len(maps), seed)["pixel_auroc"]


def count_pixels(masks: Masks, maps: Maps, num_bins: int = NUM_BINS) -> tuple[Counts, Counts]:
    """Histograms of each image's normal and of its anomalous pixels, the lowest values first.

    The bins hold about as many anomalous pixels each, so that an AUROC of them is within 1 / num_bins of the exact one.
    At least one pixel must be anomalous.
    """
    is_anomalous = masks > 0
    edges = np.unique(np.quantile(maps[is_anomalous], np.linspace(0, 1, num_bins + 1), method="lower"))
    normal, anomalous = (
        np.stack([_count(one[chosen], edges) for one, chosen in zip(maps, kind, strict=True)])
        for kind in (~is_anomalous, is_anomalous)
    )
    return normal, anomalous


def _count(
    values: Float32[np.ndarray, " num_pixels"], edges: Float32[np.ndarray, " num_edges"]
) -> Float[np.ndarray, " num_edges_and_1"]:
    """How many values lie below the first edge, from each edge to the next, and from the last on."""
    below = np.searchsorted(np.sort(values), edges, side="left")
    return np.diff(below, prepend=0, append=len(values)).astype(np.float64)


def _compute_resampled_auroc(
    normal: Counts, anomalous: Counts, weights: Float[np.ndarray, "num_resamples num_images"]
) -> dict[str, Float[np.ndarray, " num_resamples"]]:
    return {"pixel_auroc": compute_grouped_auroc(weights @ normal, weights @ anomalous)}
