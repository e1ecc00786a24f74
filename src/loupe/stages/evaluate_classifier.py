"""Test the classifier, once: figures, predictions and pictures for DVC and for the run that made it."""

import logging

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from loupe.config import Params
from loupe.data.manifest import save_table
from loupe.data.prepare import Prepared, load_prepared
from loupe.evaluation.classification import build_predictions, compute_classification_metrics, compute_confusion
from loupe.evaluation.pictures import draw_confusion, draw_history, draw_predictions
from loupe.models.classifiers import Classifier, load_classifier, predict_probabilities
from loupe.models.files import load_weights
from loupe.stages.entry import run_stage, save_json
from loupe.stages.files import HISTORY, MODELS, PREPARED, REPORTS, RUN, SKIPPED, load_data_set
from loupe.tracking.runs import connect, find_run, log_results
from loupe.training.classifier import compute_targets
from loupe.training.trainer import LAST

FOLDER, MODEL = REPORTS / "classifier", MODELS / "classifier"
METRICS = REPORTS / "metrics" / "classifier.json"

log = logging.getLogger(__name__)


def evaluate_classifier(params: Params) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    if (MODEL / SKIPPED).exists():
        save_json({}, METRICS)
        return
    prepared = load_prepared(PREPARED / "classifier")
    classifier = load_classifier(MODEL)
    labels, rows = classifier.config.labels, prepared.rows_of("test")
    index = prepared.index.iloc[rows].reset_index(drop=True)
    targets = compute_targets(index["label"].to_numpy(), labels)
    probabilities = _predict(classifier, prepared, rows)
    metrics = _compute_metrics(classifier, prepared, rows, targets, probabilities)
    predictions = build_predictions(index["image_id"], targets, probabilities, labels)
    save_table(predictions, FOLDER / "predictions.parquet")
    predictions[["label", "predicted"]].to_csv(FOLDER / "confusion.csv", index=False)
    figures = {
        "confusion": draw_confusion(compute_confusion(targets, probabilities.argmax(axis=1), len(labels)), labels),
        "history": draw_history(pd.read_csv(MODEL / HISTORY)),
        "most_wrong": _draw_most_wrong(
            prepared, rows, predictions, targets, probabilities, params.evaluate_classifier.num_pictures
        ),
    }
    for name, figure in figures.items():
        figure.savefig(FOLDER / f"{name}.png")
    save_json(metrics, METRICS)
    client = connect(load_data_set().name)
    log_results(
        client, find_run(client, MODEL / RUN), metrics=metrics, figures=figures, files=[FOLDER / "predictions.parquet"]
    )
    for name, value in metrics.items():
        log.info("%s %.4f", name, value)


def _predict(classifier: Classifier, prepared: Prepared, rows: np.ndarray) -> np.ndarray:
    """Probabilities of the images at `rows`, a few hundred read at a time."""
    classifier.to("cuda" if torch.cuda.is_available() else "cpu")
    return np.concatenate(
        [
            predict_probabilities(classifier, torch.from_numpy(prepared.images[part]).permute(0, 3, 1, 2)).numpy()
            for part in np.array_split(rows, -(-len(rows) // 512))
        ]
    )


def _compute_metrics(
    classifier: Classifier, prepared: Prepared, rows: np.ndarray, targets: np.ndarray, probabilities: np.ndarray
) -> dict[str, float]:
    """Figures of the best epoch by val loss, and beside them the accuracy of the last epoch."""
    metrics = {
        f"classifier/test/{name}": value
        for name, value in compute_classification_metrics(targets, probabilities).items()
    }
    load_weights(classifier, MODEL / LAST)
    last = compute_classification_metrics(targets, _predict(classifier, prepared, rows))
    return metrics | {
        "classifier/test/last_epoch_accuracy": last["accuracy"],
        "classifier/test/num_images": len(rows),
        "classifier/train/num_images": len(prepared.rows_of("train")),
    }


def _draw_most_wrong(
    prepared: Prepared,
    rows: np.ndarray,
    predictions: pd.DataFrame,
    targets: np.ndarray,
    probabilities: np.ndarray,
    num_pictures: int,
) -> Figure:
    """The images whose true label got the least probability."""
    given = probabilities[np.arange(len(targets)), targets]
    worst = np.argsort(given, kind="stable")[:num_pictures]
    titles = [f"{predictions['label'][i]}\nseen as {predictions['predicted'][i]}" for i in worst]
    return draw_predictions(prepared.images[rows[worst]], titles)


if __name__ == "__main__":
    run_stage(evaluate_classifier)
