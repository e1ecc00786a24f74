"""Figures of a classifier on a test set."""

import itertools
import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float, Int64
from scipy.sparse import csr_array
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    precision_recall_fscore_support,
    recall_score,
    top_k_accuracy_score,
)

LONGEST_NAME = 200  # characters; MLflow takes 250 with what stands before
CLASS_METRICS = ["precision", "recall", "f1", "support"]


def compute_classification_metrics(
    targets: Int64[np.ndarray, " num_images"], probabilities: Float[np.ndarray, "num_images num_labels"]
) -> dict[str, float]:
    """Accuracy, balanced accuracy, macro F1 (all in [0, 1], higher is better) and log loss (nats, lower is better).

    Balanced accuracy (mean recall) and macro F1 are means over the classes that occur among the targets.
    """
    num_labels = probabilities.shape[1]
    predicted = probabilities.argmax(axis=1)
    present = np.unique(targets)
    normalised = probabilities.astype(np.float64)
    normalised /= normalised.sum(axis=1, keepdims=True)
    return {
        "accuracy": float(accuracy_score(targets, predicted)),
        "balanced_accuracy": float(recall_score(targets, predicted, labels=present, average="macro", zero_division=0)),
        "macro_f1": float(f1_score(targets, predicted, labels=present, average="macro", zero_division=0)),
        "log_loss": float(log_loss(targets, normalised, labels=np.arange(num_labels))),
    }


def compute_top_3_accuracy(
    targets: Int64[np.ndarray, " num_images"], probabilities: Float[np.ndarray, "num_images num_labels"]
) -> float:
    """How often the true label is among the three likeliest, in [0, 1]; NaN where there are only three labels."""
    num_labels = probabilities.shape[1]
    if num_labels <= 3:
        return float("nan")
    return float(top_k_accuracy_score(targets, probabilities, k=3, labels=np.arange(num_labels)))


def compute_resampled_metrics(
    targets: Int64[np.ndarray, " num_images"],
    probabilities: Float[np.ndarray, "num_images num_labels"],
    weights: Float[np.ndarray, "num_resamples num_images"],
) -> dict[str, Float[np.ndarray, " num_resamples"]]:
    """What `compute_classification_metrics` gives of each resample, for all of them at once.

    Args:
        weights: how often a resample has each image; each row sums to the number of images.
    """
    num_images, num_labels = probabilities.shape
    predicted = probabilities.argmax(axis=1)
    is_right = predicted == targets
    normalised = probabilities.astype(np.float64)
    given = normalised[np.arange(num_images), targets] / normalised.sum(axis=1)
    eps = np.finfo(np.float64).eps  # as scikit-learn's log_loss clips

    def count(labels: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Images of each label among those chosen: a row a resample."""
        columns = csr_array((chosen.astype(np.float64), (np.arange(num_images), labels)), (num_images, num_labels))
        counts: np.ndarray = weights @ columns
        return counts

    num_true, num_right = count(targets, np.ones(num_images)), count(targets, is_right)
    num_guessed = count(predicted, np.ones(num_images))
    num_present = (num_true > 0).sum(axis=1)
    recalls = num_right / np.maximum(num_true, 1)
    f1s = np.where(num_true > 0, 2 * num_right / np.maximum(num_true + num_guessed, 1), 0)
    return {
        "accuracy": weights @ is_right / num_images,
        "balanced_accuracy": recalls.sum(axis=1) / num_present,
        "macro_f1": f1s.sum(axis=1) / num_present,
        "log_loss": weights @ -np.log(np.clip(given, eps, 1 - eps)) / num_images,
    }


def compute_class_metrics(
    targets: Int64[np.ndarray, " num_images"], predicted: Int64[np.ndarray, " num_images"], num_labels: int
) -> pd.DataFrame:
    """precision, recall, f1 (in [0, 1], higher is better) and support (a count); row i is label i.

    What is not defined is NaN: the precision of a label that was never predicted, the recall of one that the test
    images lack, and the F1 of one that is neither.
    """
    values = precision_recall_fscore_support(targets, predicted, labels=np.arange(num_labels), zero_division=np.nan)
    return pd.DataFrame(dict(zip(CLASS_METRICS, values, strict=True)))


def name_metrics(labels: Sequence[str]) -> list[str]:
    """Each label as a part of a metric's name: characters that MLflow refuses become `_`, and no two names are equal.

    MLflow allows letters, digits, `_`, `-`, `.`, `:`, spaces and slashes, which would make a path here.
    """
    names: list[str] = []
    for label in labels:
        name = re.sub(r"[^\w.\- :]|^\.+$", "_", label[:LONGEST_NAME])
        others = (f"{name}_{number}" for number in itertools.count(2))
        names.append(name if name not in names else next(other for other in others if other not in names))
    return names


def compute_confusion(
    targets: Int64[np.ndarray, " num_images"], predicted: Int64[np.ndarray, " num_images"], num_labels: int
) -> Int64[np.ndarray, "num_labels num_labels"]:
    """Counts: a row a true label, a column a predicted one."""
    counts: np.ndarray = confusion_matrix(targets, predicted, labels=np.arange(num_labels))
    return counts


def build_predictions(
    image_ids: pd.Series,
    targets: Int64[np.ndarray, " num_images"],
    probabilities: Float[np.ndarray, "num_images num_labels"],
    labels: list[str],
) -> pd.DataFrame:
    """One row an image: image_id, label, predicted, and one probability a class in a column named after it."""
    names = np.array(labels)
    table = pd.DataFrame(
        {"image_id": image_ids.to_numpy(), "label": names[targets], "predicted": names[probabilities.argmax(axis=1)]}
    )
    return pd.concat([table, pd.DataFrame(probabilities, columns=[f"probability_{name}" for name in labels])], axis=1)
