"""Export the detector as ONNX, and compare what the file says of the test images with what the network says."""

import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from loupe.config import Params
from loupe.data.prepare import Prepared, load_prepared
from loupe.evaluation.agreement import Anomalies, compare_anomalies
from loupe.models import export
from loupe.models.detectors.base import Detector, detect
from loupe.models.detectors.family import load_detector
from loupe.models.detectors.tiling import TiledDetector
from loupe.models.files import load_config
from loupe.stages.files import MODELS, PREPARED, REPORTS
from loupe.stages.recording import record_results

MODEL, FOLDER = MODELS / "detector", MODELS / "exported" / "detector"
METRICS = REPORTS / "metrics" / "detector_export.json"
NUM_EXAMPLES = 2  # one alone would freeze the batch size

log = logging.getLogger(__name__)


def export_detector(params: Params) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    path, threshold = FOLDER / "model.onnx", float(load_config(MODEL)["threshold"])
    prepared, detector = load_prepared(PREPARED / "detector"), load_detector(MODEL)
    example = torch.from_numpy(next(prepared.read_batches(np.arange(NUM_EXAMPLES), NUM_EXAMPLES)))
    export.export_detector(detector, example, path, prepared.geometry.to_json(), threshold)
    agreement = compare_anomalies(_detect_twice(detector, path, prepared), threshold)
    files = sorted(FOLDER.glob(f"{path.name}*"))  # weights of gigabytes lie beside it
    values = {**asdict(agreement), "num_bytes": sum(file.stat().st_size for file in files)}
    metrics = {f"detector/export/{name}": value for name, value in values.items()}
    record_results("detector", metrics, METRICS, FOLDER, files)
    log.info("%s, %.1f MB: %s", path, values["num_bytes"] / 1e6, agreement.describe())
    if not agreement.agrees:
        log.warning("the exported detector disagrees with the trained one, which will not be promoted")


def _detect_twice(detector: Detector, path: Path, prepared: Prepared) -> Iterator[tuple[Anomalies, Anomalies]]:
    """Scores and maps of the test images by torch and by the file, both on the CPU, some at a time.

    A file looks at all tiles of a batch at once.
    """
    exported, num_tiles = export.ExportedModel(path), 1
    if isinstance(detector, TiledDetector):
        num_tiles = detector.config.rows * detector.config.columns
    for images in prepared.read_batches(prepared.rows_of("test"), max(1, prepared.geometry.batch_size // num_tiles)):
        scores, maps = detect(detector, torch.from_numpy(images), len(images))
        exported_scores, exported_maps = exported.run(images)
        yield (scores.numpy(), maps.numpy()), (exported_scores, exported_maps)
