"""Export the classifier as ONNX, and compare what the file says of the test images with what the network says."""

import logging
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from loupe.config import Params
from loupe.data.prepare import Prepared, load_prepared
from loupe.evaluation.agreement import compare_scores
from loupe.models import export
from loupe.models.classifiers import Classifier, load_classifier, predict_probabilities
from loupe.stages.files import MODELS, PREPARED, REPORTS
from loupe.stages.recording import record_results

MODEL, FOLDER = MODELS / "classifier", MODELS / "exported" / "classifier"
METRICS = REPORTS / "metrics" / "classifier_export.json"
NUM_EXAMPLES = 2  # one alone would freeze the batch size
BATCH_SIZE = 128

log = logging.getLogger(__name__)


def export_classifier(params: Params) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / "model.onnx"
    prepared = load_prepared(PREPARED / "classifier")
    classifier = load_classifier(MODEL)
    example = torch.from_numpy(next(prepared.read_batches(np.arange(NUM_EXAMPLES), NUM_EXAMPLES)))
    export.export_classifier(classifier, example, path, prepared.geometry.to_json())
    agreement = compare_scores(*_predict_twice(classifier, path, prepared))
    files = sorted(FOLDER.glob(f"{path.name}*"))  # weights of gigabytes lie beside it
    values = {**asdict(agreement), "num_bytes": sum(file.stat().st_size for file in files)}
    metrics = {f"classifier/export/{name}": value for name, value in values.items()}
    record_results("classifier", metrics, METRICS, FOLDER, files)
    log.info("%s, %.1f MB: %s", path, values["num_bytes"] / 1e6, agreement.describe())
    if not agreement.agrees:
        log.warning("the exported classifier disagrees with the trained one, which will not be promoted")


def _predict_twice(classifier: Classifier, path: Path, prepared: Prepared) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of the test images by torch and by the file, both on the CPU, some at a time."""
    exported = export.ExportedModel(path)
    by_torch, by_file = [], []
    for images in prepared.read_batches(prepared.rows_of("test"), BATCH_SIZE):
        by_torch.append(predict_probabilities(classifier, torch.from_numpy(images)).numpy())
        by_file += exported.run(images)
    return np.concatenate(by_torch), np.concatenate(by_file)
