"""The stage on a small folder with an autoencoder that has learnt nothing: what it writes and what it records."""

import json
import logging

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from loupe.config import load_params
from loupe.data.images import Geometry
from loupe.data.manifest import save_table
from loupe.data.prepare import load_prepared, prepare_images
from loupe.errors import DataError
from loupe.models.detectors.autoencoder import Autoencoder, AutoencoderConfig
from loupe.models.detectors.base import detect, save_detector
from loupe.stages import evaluate_detector as stage
from loupe.stages.detector_explanation import compute_in_batches
from loupe.stages.evaluate_detector import evaluate_detector
from loupe.tracking.runs import connect, start_run

GEOMETRY = Geometry(20, 24, 3, 20, 24, 32, 32, "squash", "bilinear")
LABELS = ["good"] * 20 + ["scratch"] * 8 + ["dent"] * 4
PICTURES = {"scores.png", "heat_maps.png", "worst_misses.png", "worst_false_alarms.png", "history.png"}
THRESHOLD = 0.9  # of calibration scores from 0 to 1: nothing that an untrained network says of these images is above


@pytest.fixture(scope="module")
def params(repository):
    return load_params(repository / "params.yaml")


def build_autoencoder():
    torch.manual_seed(0)
    return Autoencoder(AutoencoderConfig(3, 4, 2, (20, 24), (32, 32))).eval()


def save_model(folder, autoencoder):
    extra = {"geometry": GEOMETRY.to_json(), "best_epoch": 1, "weights": None, "normal_label": "good"}
    save_detector(autoencoder, {**extra, "threshold": THRESHOLD, "false_alarm_rate": 0.1}, folder)


@pytest.fixture(scope="module")
def project(tmp_path_factory, write):
    """A folder in which a detector was trained; of 32 images 6 train it, and the scratches alone have masks."""
    folder = tmp_path_factory.mktemp("project")
    root = folder / "tiles"
    rows = [{"image_id": f"{i * 7 % 32:064x}", "label": label, "path": f"{i}.png"} for i, label in enumerate(LABELS)]
    mask = np.zeros((20, 24), np.uint8)
    mask[4:9, 8:16] = 255
    for number, row in enumerate(rows):
        write(root / row["path"], number)
        row["mask_path"] = f"masks/{number}.png" if row["label"] == "scratch" else None
    (root / "masks").mkdir()
    for row in rows:
        if row["mask_path"]:
            Image.fromarray(mask).save(root / row["mask_path"])
    table = pd.DataFrame(rows).assign(num_bytes=100, split=["train"] * 6 + ["test"] * 26)
    prepare_images(root, table, GEOMETRY, folder / "data/prepared/detector")
    listing = {"name": "tiles", "source": str(root), "layout": "table", "num_images": 32, "num_quarantined": 0}
    (folder / "data/ingest").mkdir()
    (folder / "data/ingest/listing.json").write_text(json.dumps(listing))
    save_model(folder / "models/detector", build_autoencoder())
    scores = pd.DataFrame({"image_id": [f"{i}" for i in range(9)], "anomaly_score": np.linspace(0.1, THRESHOLD, 9)})
    save_table(scores, folder / "models/detector/calibration_scores.parquet")
    history = pd.DataFrame({"epoch": [0, 1], "train/loss": [2.0, 1.0], "val/loss": [2.0, 1.5]})
    history.to_csv(folder / "models/detector/history.csv", index=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        connect("tiles")
        with start_run("detector", {}, {}) as run_id:
            (folder / "models/detector/run.json").write_text(json.dumps({"run_id": run_id}))
        yield folder


def test_figures_are_those_of_the_kept_scores_and_are_recorded_with_pictures_and_page(params, project):
    evaluate_detector(params)
    metrics = json.loads((project / "reports/metrics/detector.json").read_text())
    scores = pd.read_parquet(project / "reports/detector/scores.parquet")
    is_defect = scores["label"] != "good"
    assert metrics["detector/test/image_auroc"] == pytest.approx(roc_auc_score(is_defect, scores["anomaly_score"]))
    assert metrics["detector/threshold"] == THRESHOLD == scores["threshold"].unique().item()
    assert (scores["is_anomalous"] == (scores["anomaly_score"] > THRESHOLD)).all()
    assert metrics["detector/test/num_images/dent"] == 4
    assert (metrics["detector/test/num_images"], metrics["detector/train/num_images"]) == (26, 6)

    run_id = json.loads((project / "models/detector/run.json").read_text())["run_id"]
    client = mlflow.MlflowClient()
    assert client.get_run(run_id).data.metrics == pytest.approx(metrics)
    assert {file.path for file in client.list_artifacts(run_id, "pictures")} == {f"pictures/{one}" for one in PICTURES}
    assert {file.path for file in client.list_artifacts(run_id, "results")} == {
        "results/scores.parquet",
        "results/detector.html",
    }
    assert {path.name for path in (project / "reports/detector").iterdir()} == {*PICTURES, "run.json", "scores.parquet"}


def test_pixels_are_known_of_images_with_masks_and_of_normal_ones(params, project, monkeypatch, caplog):
    seen = []
    judge = stage.judge_detector
    monkeypatch.setattr(stage, "judge_detector", lambda *given: seen.append(given[2]) or judge(*given))
    evaluate_detector(params)
    masks, maps = seen[0]
    assert len(masks) == len(maps) == 14 + 8
    assert (masks.sum(axis=(1, 2)) > 0).sum() == 8
    monkeypatch.setattr(stage, "MOST_MAP_BYTES", 10 * 4 * 20 * 24 + 5)
    with caplog.at_level(logging.INFO):
        evaluate_detector(params)
    np.testing.assert_array_equal(seen[1].maps, maps[:10])
    assert "figures over pixels are of 10 of the 22 images" in caplog.text


def test_scores_and_maps_in_batches_are_those_of_all_at_once(project):
    prepared, autoencoder = load_prepared(project / "data/prepared/detector"), build_autoencoder()
    rows, keeps_map = np.arange(32)[::-1].copy(), np.arange(32) % 3 == 1
    scores, maps = compute_in_batches(autoencoder, prepared, rows, keeps_map)
    images = torch.from_numpy(prepared.images[rows]).permute(0, 3, 1, 2)
    expected_scores, expected_maps = detect(autoencoder, images, 32)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5)
    np.testing.assert_allclose(maps, expected_maps[keeps_map], rtol=1e-4, atol=1e-6)


def test_scores_that_are_no_numbers_stop_the_stage_with_what_to_do(params, project, tmp_path, monkeypatch):
    broken = build_autoencoder()
    torch.nn.init.constant_(broken.decoder[0].weight, float("nan"))
    save_model(tmp_path, broken)
    monkeypatch.setattr(stage, "MODEL", tmp_path)
    with pytest.raises(DataError, match=r"scores of 26 of 26 test images are no finite numbers: .* train it again"):
        evaluate_detector(params)
