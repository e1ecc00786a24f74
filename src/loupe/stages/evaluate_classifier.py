"""Test the classifier, once: figures, predictions, pictures and a page for DVC and for the run that made it."""

import filecmp
import logging

import numpy as np
import pandas as pd
import torch

from loupe.config import Params
from loupe.data.manifest import save_table
from loupe.data.prepare import Prepared, load_prepared
from loupe.evaluation.classification import build_predictions, compute_classification_metrics
from loupe.evaluation.judgement import Answers, judge_classifier
from loupe.models.classifiers import Classifier, compute_targets, load_classifier, predict_probabilities
from loupe.models.files import LAST, WEIGHTS, load_config, load_weights
from loupe.reporting.page import save_page
from loupe.stages.classifier_explanation import explain_classifier
from loupe.stages.classifier_report import Report, describe_training, render_report, save_pictures
from loupe.stages.files import HISTORY, MODELS, PREPARED, REPORTS, load_data_set
from loupe.stages.recording import record_results

FOLDER, MODEL = REPORTS / "classifier", MODELS / "classifier"
METRICS, PAGE = REPORTS / "metrics" / "classifier.json", REPORTS / "classifier.html"

log = logging.getLogger(__name__)


def evaluate_classifier(params: Params) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    prepared, classifier = load_prepared(PREPARED / "classifier"), _load_classifier()
    labels, rows = classifier.config.labels, prepared.rows_of("test")
    test, calibration = (_ask(classifier, prepared, split) for split in ("test", "calibration"))
    judgement = judge_classifier(test, calibration, params.seed)
    explanation = explain_classifier(classifier, prepared, rows, test, params.evaluate_classifier.num_pictures)
    metrics = {f"classifier/test/{name}": value for name, value in judgement.to_metrics(labels).items()}
    metrics |= _describe_run(prepared, test)
    predictions = build_predictions(prepared.index["image_id"].iloc[rows], test.targets, test.probabilities, labels)
    save_table(predictions, FOLDER / "predictions.parquet")
    predictions[["label", "predicted"]].to_csv(FOLDER / "confusion.csv", index=False)
    last = metrics["classifier/test/last_epoch_accuracy"]
    facts = describe_training(load_config(MODEL), classifier.config, prepared, last)
    history, name = pd.read_csv(MODEL / HISTORY), load_data_set().name
    report = Report(name, labels, facts, history, judgement, explanation)
    pictures = save_pictures(report, FOLDER)
    save_page(render_report(report, pictures), PAGE)
    files = [*pictures.values(), FOLDER / "predictions.parquet", PAGE]
    record_results("classifier", metrics, METRICS, FOLDER, files)
    for metric, value in metrics.items():
        if metric.count("/") == 2:  # those of single labels stand on the page
            log.info("%s %.6g", metric, value)


def _load_classifier() -> Classifier:
    return load_classifier(MODEL).to("cuda" if torch.cuda.is_available() else "cpu")


def _ask(classifier: Classifier, prepared: Prepared, split: str) -> Answers:
    """What the classifier says of a split's images, a few hundred of them read at a time."""
    labels, rows = classifier.config.labels, prepared.rows_of(split)
    parts = [
        predict_probabilities(classifier, torch.from_numpy(prepared.images[part]).permute(0, 3, 1, 2)).numpy()
        for part in np.array_split(rows, -(-len(rows) // 512) or 1)
        if len(part)
    ]
    return Answers(
        compute_targets(prepared.index["label"].to_numpy()[rows], labels),
        np.concatenate([np.zeros((0, len(labels)), np.float32), *parts]),
    )


def _describe_run(prepared: Prepared, best: Answers) -> dict[str, float]:
    """The accuracy of the last epoch beside that of the best by val loss, and how many images there were."""
    last = best
    if not filecmp.cmp(MODEL / WEIGHTS, MODEL / LAST, shallow=False):
        classifier = _load_classifier()
        load_weights(classifier, MODEL / LAST)
        last = _ask(classifier, prepared, "test")
    return {
        "classifier/test/last_epoch_accuracy": compute_classification_metrics(last.targets, last.probabilities)[
            "accuracy"
        ],
        **{
            f"classifier/{split}/num_images": len(prepared.rows_of(split)) for split in ("test", "train", "calibration")
        },
    }
