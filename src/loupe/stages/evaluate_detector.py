"""Test the detector, once: figures, scores, pictures and a page for DVC and for the run that made it."""

import logging

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int64, UInt8

from loupe.config import Params
from loupe.data.manifest import load_table, save_table
from loupe.data.prepare import Prepared, load_prepared
from loupe.errors import DataError
from loupe.evaluation.detection import DetectorJudgement, Pixels, Scored, judge_detector
from loupe.evaluation.thresholds import explain_threshold
from loupe.models.detectors.base import Detector
from loupe.models.detectors.family import load_detector
from loupe.models.files import load_config
from loupe.reporting.page import save_page
from loupe.stages.detector_explanation import compute_in_batches, explain_detector
from loupe.stages.detector_report import Report, describe_detector, render_report, save_pictures
from loupe.stages.files import CALIBRATION, HISTORY, MODELS, PREPARED, REPORTS, load_data_set
from loupe.stages.recording import record_results

FOLDER, MODEL = REPORTS / "detector", MODELS / "detector"
METRICS, PAGE = REPORTS / "metrics" / "detector.json", REPORTS / "detector.html"
MOST_MAP_BYTES = 1 << 30  # of maps that are kept for figures over pixels, which take several times as much

log = logging.getLogger(__name__)


def evaluate_detector(params: Params) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    prepared, config, name = load_prepared(PREPARED / "detector"), load_config(MODEL), load_data_set().name
    detector = load_detector(MODEL).to("cuda" if torch.cuda.is_available() else "cpu")
    rows = prepared.rows_of("test")
    test, pixels = _ask(detector, prepared, rows, config["normal_label"])
    calibration_scores = load_table(MODEL / CALIBRATION)["anomaly_score"].to_numpy()
    threshold = explain_threshold(calibration_scores, config["false_alarm_rate"])
    report = Report(
        name=name,
        facts=describe_detector(config, prepared, params.seed),
        history=_load_history(),
        test=test,
        calibration_scores=calibration_scores,
        judgement=judge_detector(test, threshold, pixels, params.seed),
        explanation=explain_detector(detector, prepared, rows, test, params.evaluate_detector.num_pictures),
    )
    metrics = _name_metrics(report.judgement, prepared)
    pictures = save_pictures(report, FOLDER)
    save_page(render_report(report), PAGE)
    _save_scores(prepared, rows, test, threshold.value)
    files = [*pictures.values(), FOLDER / "scores.parquet", PAGE]
    record_results("detector", metrics, METRICS, FOLDER, files)
    for metric, value in metrics.items():
        if metric.count("/") == 2:  # those of single kinds stand on the page
            log.info("%s %.6g", metric, value)


def _load_history() -> pd.DataFrame | None:
    """A row an epoch; None of a detector that was not trained in epochs."""
    history = pd.read_csv(MODEL / HISTORY)
    return history if len(history) > 1 else None


def _ask(
    detector: Detector, prepared: Prepared, rows: Int64[np.ndarray, " num_images"], normal_label: str
) -> tuple[Scored, Pixels | None]:
    """What the detector says of the images at `rows`, and of the pixels of those whose masks are known.

    Raises:
        DataError: if a score is not finite.
    """
    known = _find_known(prepared, rows, normal_label)
    scores, maps = compute_in_batches(detector, prepared, rows, known)
    if wrong := int((~np.isfinite(scores)).sum()):
        raise DataError(
            f"the scores of {wrong} of {len(scores)} test images are no finite numbers: the detector is broken; train "
            f"it again with a lower learning rate, or choose another with train_detector.model"
        )
    test = Scored(list(prepared.index["label"].iloc[rows]), scores, normal_label)
    return test, Pixels(_gather_masks(prepared, rows[known]), maps) if known.any() else None


def _find_known(prepared: Prepared, rows: Int64[np.ndarray, " num_images"], normal_label: str) -> np.ndarray:
    """Whether an image's pixels are known and its map is kept: those with masks, and normal ones beside them.

    Of more than fit in memory the first are taken; rows are in the order of hashes, so that these are as good as drawn.
    """
    index = prepared.index.iloc[rows]
    has_mask = index["mask_row"].to_numpy() >= 0
    known = has_mask | index["label"].eq(normal_label).to_numpy()
    most = MOST_MAP_BYTES // (4 * prepared.geometry.height * prepared.geometry.width)
    if known.sum() > most:
        log.info("figures over pixels are of %d of the %d images whose pixels are known", most, known.sum())
    return known & (known.cumsum() <= most) & has_mask.any()


def _gather_masks(
    prepared: Prepared, rows: Int64[np.ndarray, " num_images"]
) -> UInt8[np.ndarray, "num_images height width"]:
    """The masks of the images at `rows`; empty for images without one, which are normal."""
    masks = np.zeros((len(rows), prepared.geometry.height, prepared.geometry.width), np.uint8)
    for mask, mask_row in zip(masks, prepared.index["mask_row"].to_numpy()[rows], strict=True):
        if mask_row >= 0:
            mask[:] = prepared.masks[mask_row]
    return masks


def _name_metrics(judgement: DetectorJudgement, prepared: Prepared) -> dict[str, float]:
    return {
        **{f"detector/test/{name}": value for name, value in judgement.to_metrics().items()},
        "detector/threshold": judgement.threshold.value,
        **{f"detector/{split}/num_images": len(prepared.rows_of(split)) for split in ("train", "calibration")},
    }


def _save_scores(prepared: Prepared, rows: Int64[np.ndarray, " num_images"], test: Scored, threshold: float) -> None:
    table = pd.DataFrame(
        {
            "image_id": prepared.index["image_id"].to_numpy()[rows],
            "label": test.labels,
            "anomaly_score": test.scores,
            "is_anomalous": test.scores > threshold,
            "threshold": threshold,
        }
    )
    save_table(table, FOLDER / "scores.parquet")
