"""Figures of an anomaly detector's images, on raw scores; a higher score is more anomalous."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int64
from scipy.sparse import csr_array
from sklearn.metrics import average_precision_score, f1_score, precision_recall_curve, roc_auc_score

Kinds = Bool[np.ndarray, " num_images"]
Scores = Float[np.ndarray, " num_images"]
Groups = Float[np.ndarray, "num_resamples num_groups"]


def compute_anomaly_metrics(is_anomalous: Kinds, scores: Scores, threshold: float) -> dict[str, float]:
    """Figures over all thresholds: image AUROC, average precision and the best F1; at this one: F1 and both rates.

    All in [0, 1]; of the false-alarm and the miss rate lower is better, otherwise higher. An image is flagged where its
    score is above the threshold. The best F1 is that of the threshold which test images themselves would choose: what
    no threshold of calibration images can surpass. NaN where it takes a kind of image that is absent.
    """
    flagged = scores > threshold
    has_anomalous, has_normal = bool(is_anomalous.any()), not is_anomalous.all()
    nan = float("nan")
    return {
        "image_auroc": compute_image_auroc(is_anomalous, scores),
        "image_average_precision": float(average_precision_score(is_anomalous, scores))
        if has_anomalous and has_normal
        else nan,
        "f1": float(f1_score(is_anomalous, flagged, zero_division=0)) if has_anomalous else nan,
        "best_f1": _compute_best_f1(is_anomalous, scores) if has_anomalous else nan,
        "false_alarm_rate": float(flagged[~is_anomalous].mean()) if has_normal else nan,
        "miss_rate": float((~flagged[is_anomalous]).mean()) if has_anomalous else nan,
    }


def compute_image_auroc(is_anomalous: Kinds, scores: Scores) -> float:
    """The chance that an anomalous image scores above a normal one, ties counting half; NaN without one of each."""
    if not is_anomalous.any() or is_anomalous.all():
        return float("nan")
    return float(roc_auc_score(is_anomalous, scores))


def _compute_best_f1(is_anomalous: Kinds, scores: Scores) -> float:
    precision, recall, _ = precision_recall_curve(is_anomalous, scores)
    return float((2 * precision * recall / np.maximum(precision + recall, np.finfo(np.float64).tiny)).max())


def compute_kind_metrics(labels: Sequence[str], scores: Scores, threshold: float, normal_label: str) -> pd.DataFrame:
    """A row a kind of defect, by name: kind, num_images, image_auroc (against all normal images) and miss_rate.

    The AUROC is NaN where there is no normal image.
    """
    names = np.asarray(labels, dtype=object)
    normal = scores[names == normal_label]
    rows = []
    for kind in sorted(set(names) - {normal_label}):
        own = scores[names == kind]
        is_own = np.arange(len(own) + len(normal)) < len(own)
        rows.append(
            {
                "kind": kind,
                "num_images": len(own),
                "image_auroc": compute_image_auroc(is_own, np.concatenate([own, normal])),
                "miss_rate": float((own <= threshold).mean()),
            }
        )
    return pd.DataFrame(rows, columns=["kind", "num_images", "image_auroc", "miss_rate"])


def compute_resampled_metrics(
    is_anomalous: Kinds, scores: Scores, weights: Float[np.ndarray, "num_resamples num_images"]
) -> dict[str, Float[np.ndarray, " num_resamples"]]:
    """Image AUROC and average precision of each resample, all of them at once; NaN where one kind of image is absent.

    Args:
        weights: how often a resample has each image.
    """
    groups = np.unique(scores, return_inverse=True)[1]
    normal, anomalous = (weights @ _tabulate(groups, chosen) for chosen in (~is_anomalous, is_anomalous))
    return {
        "image_auroc": compute_grouped_auroc(normal, anomalous),
        "image_average_precision": _compute_grouped_average_precision(normal, anomalous),
    }


def _tabulate(groups: Int64[np.ndarray, " num_images"], chosen: Kinds) -> csr_array:
    """A row an image: 1 in the column of its group if it is chosen."""
    rows = np.arange(len(groups))
    return csr_array((chosen.astype(np.float64), (rows, groups)), (len(groups), int(groups.max()) + 1))


def compute_grouped_auroc(normal: Groups, anomalous: Groups) -> Float[np.ndarray, " num_resamples"]:
    """AUROC of weighted scores that come in groups, the lowest first; those of one group count as ties.

    NaN where a resample has only one kind.
    """
    wins = (anomalous * (normal.cumsum(axis=1) - normal / 2)).sum(axis=1)
    return _divide(wins, normal.sum(axis=1) * anomalous.sum(axis=1))


def _compute_grouped_average_precision(normal: Groups, anomalous: Groups) -> Float[np.ndarray, " num_resamples"]:
    """Precision at each score, the highest first, weighted by the recall that it adds; NaN with only one kind."""
    hits = anomalous[:, ::-1].cumsum(axis=1)
    flagged = hits + normal[:, ::-1].cumsum(axis=1)
    total = (anomalous[:, ::-1] * hits / np.maximum(flagged, 1)).sum(axis=1)
    return np.where(normal.sum(axis=1) > 0, _divide(total, anomalous.sum(axis=1)), np.nan)


def _divide(
    top: Float[np.ndarray, " num_resamples"], bottom: Float[np.ndarray, " num_resamples"]
) -> Float[np.ndarray, " num_resamples"]:
    """NaN where it would be by zero."""
    return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1), np.nan)
