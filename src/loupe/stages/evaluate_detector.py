"""Test the detector, once: figures, scores and pictures for DVC and for the run that made it."""

import logging

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from loupe.config import Params
from loupe.data.manifest import save_table
from loupe.data.prepare import Prepared, load_prepared
from loupe.evaluation.anomaly import compute_anomaly_metrics, compute_pixel_auroc
from loupe.evaluation.pictures import draw_heat_maps, draw_history, draw_scores
from loupe.models.detectors.autoencoder import Autoencoder, compute_maps, compute_scores, load_autoencoder
from loupe.models.files import load_config
from loupe.stages.entry import run_stage, save_json
from loupe.stages.files import HISTORY, MODELS, PREPARED, REPORTS, RUN, SKIPPED, load_data_set
from loupe.tracking.runs import connect, find_run, log_results

FOLDER, MODEL = REPORTS / "detector", MODELS / "detector"
METRICS = REPORTS / "metrics" / "detector.json"

log = logging.getLogger(__name__)


def evaluate_detector(params: Params) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    if (MODEL / SKIPPED).exists():
        save_json({}, METRICS)
        return
    prepared, config = load_prepared(PREPARED / "detector"), load_config(MODEL)
    autoencoder = load_autoencoder(MODEL).to("cuda" if torch.cuda.is_available() else "cpu")
    rows = prepared.rows_of("test")
    index = prepared.index.iloc[rows].reset_index(drop=True)
    images = torch.from_numpy(prepared.images[rows]).permute(0, 3, 1, 2)
    scores = compute_scores(autoencoder, images).numpy().astype(np.float64)
    table = pd.DataFrame(
        {
            "image_id": index["image_id"],
            "label": index["label"],
            "anomaly_score": scores,
            "is_anomalous": scores > config["threshold"],
            "threshold": config["threshold"],
        }
    )
    save_table(table, FOLDER / "scores.parquet")
    metrics = _compute_metrics(autoencoder, prepared, rows, scores, config)
    figures = {
        "scores": draw_scores(scores, list(index["label"]), config["normal_label"], config["threshold"]),
        "history": draw_history(pd.read_csv(MODEL / HISTORY)),
        "heat_maps": _draw_samples(
            autoencoder, images, table, config["normal_label"], params.evaluate_detector.num_pictures
        ),
    }
    for name, figure in figures.items():
        figure.savefig(FOLDER / f"{name}.png")
    save_json(metrics, METRICS)
    client = connect(load_data_set().name)
    log_results(
        client, find_run(client, MODEL / RUN), metrics=metrics, figures=figures, files=[FOLDER / "scores.parquet"]
    )
    for name, value in metrics.items():
        log.info("%s %.4f", name, value)


def _compute_metrics(
    autoencoder: Autoencoder, prepared: Prepared, rows: np.ndarray, scores: np.ndarray, config: dict[str, object]
) -> dict[str, float]:
    is_anomalous = prepared.index["label"].to_numpy()[rows] != config["normal_label"]
    metrics = compute_anomaly_metrics(is_anomalous, scores, float(str(config["threshold"])))
    mask_rows = prepared.index["mask_row"].to_numpy()[rows]
    if (mask_rows >= 0).any():
        known = rows[(mask_rows >= 0) | ~is_anomalous]
        maps = compute_maps(autoencoder, torch.from_numpy(prepared.images[known]).permute(0, 3, 1, 2)).numpy()
        metrics["pixel_auroc"] = compute_pixel_auroc(_gather_masks(prepared, known), maps)
    metrics |= {"num_images": len(rows), "num_anomalous": int(is_anomalous.sum())}
    return {f"detector/test/{name}": value for name, value in metrics.items()} | {
        "detector/threshold": float(str(config["threshold"])),
        "detector/train/num_images": len(prepared.rows_of("train")),
        "detector/calibration/num_images": len(prepared.rows_of("calibration")),
    }


def _gather_masks(prepared: Prepared, rows: np.ndarray) -> np.ndarray:
    """The masks of the images at `rows`; empty for images without one, which are normal."""
    masks = np.zeros((len(rows), prepared.geometry.height, prepared.geometry.width), np.uint8)
    mask_rows = prepared.index["mask_row"].to_numpy()[rows]
    masks[mask_rows >= 0] = prepared.masks[mask_rows[mask_rows >= 0]]
    return masks


def _draw_samples(
    autoencoder: Autoencoder, images: torch.Tensor, table: pd.DataFrame, normal_label: str, num_pictures: int
) -> Figure:
    """Worst false alarms and worst misses, half and half: the most anomalous normal, the least anomalous anomalous."""
    ranked = table.sort_values("anomaly_score", kind="stable")
    half = -(-num_pictures // 2)
    chosen = [
        *ranked[ranked["label"].eq(normal_label)].index[::-1][:half],
        *ranked[ranked["label"].ne(normal_label)].index[:half],
    ]
    device = autoencoder.preprocess.mean.device
    with torch.inference_mode():
        _, reconstructions = autoencoder(images[chosen].to(device))
    maps = compute_maps(autoencoder, images[chosen]).numpy()
    titles = [f"{table['label'][i]}\n{table['anomaly_score'][i]:.2g}" for i in chosen]
    return draw_heat_maps(
        images[chosen].permute(0, 2, 3, 1).numpy(), reconstructions.permute(0, 2, 3, 1).cpu().numpy(), maps, titles
    )


if __name__ == "__main__":
    run_stage(evaluate_detector)
