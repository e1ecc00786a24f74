"""Figures of a classifier on a test set."""

import numpy as np
import pandas as pd
from jaxtyping import Float, Int64
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss, recall_score


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
