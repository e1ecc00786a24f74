"""Figures of an anomaly detector, on raw scores; a higher score is more anomalous."""

import numpy as np
from jaxtyping import Bool, Float, UInt8
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score


def compute_anomaly_metrics(
    is_anomalous: Bool[np.ndarray, " num_images"], scores: Float[np.ndarray, " num_images"], threshold: float
) -> dict[str, float]:
    """Image AUROC and average precision over all thresholds; F1, false-alarm and miss rate at this one.

    All in [0, 1]. An image is flagged where its score is above the threshold. NaN where only one kind is present.
    """
    flagged = scores > threshold
    both = is_anomalous.any() and not is_anomalous.all()
    return {
        "image_auroc": compute_image_auroc(is_anomalous, scores),
        "image_average_precision": float(average_precision_score(is_anomalous, scores)) if both else float("nan"),
        "f1": float(f1_score(is_anomalous, flagged, zero_division=0)),
        "false_alarm_rate": float(flagged[~is_anomalous].mean()) if not is_anomalous.all() else float("nan"),
        "miss_rate": float((~flagged[is_anomalous]).mean()) if is_anomalous.any() else float("nan"),
    }


def compute_image_auroc(
    is_anomalous: Bool[np.ndarray, " num_images"], scores: Float[np.ndarray, " num_images"]
) -> float:
    """The chance that an anomalous image scores above a normal one, ties counting half; NaN without one of each."""
    if not is_anomalous.any() or is_anomalous.all():
        return float("nan")
    return float(roc_auc_score(is_anomalous, scores))


def compute_pixel_auroc(
    masks: UInt8[np.ndarray, "num_images height width"], maps: Float[np.ndarray, "num_images height width"]
) -> float:
    """AUROC over all pixels; masks are 1 where anomalous. NaN where only one kind of pixel is present."""
    targets = masks.reshape(-1) > 0
    if not targets.any() or targets.all():
        return float("nan")
    return float(roc_auc_score(targets, maps.reshape(-1)))
