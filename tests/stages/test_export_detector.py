import json
import logging

import mlflow
import onnx
import pandas as pd
import pytest
import torch

from loupe.config import load_params
from loupe.data.images import Geometry
from loupe.data.prepare import load_prepared, prepare_images
from loupe.models import export
from loupe.models.detectors.base import FeatureDetector, fit_detector, save_detector
from loupe.models.detectors.family import FAMILY, build_detector
from loupe.stages.export_detector import export_detector
from loupe.stages.train_detector import build_config
from loupe.tracking.runs import connect, start_run

GEOMETRY = Geometry(40, 56, 1, 40, 56, 64, 96, "squash", "bilinear")
EXPORTED = "models/exported/detector/model.onnx"
FIGURES = "reports/metrics/detector_export.json"


@pytest.fixture(scope="module")
def params(repository):
    return load_params(repository / "params.yaml")


@pytest.fixture(scope="module")
def project(tmp_path_factory, write):
    """A folder of 19 prepared images, 7 of them of test, and a run for a detector."""
    folder = tmp_path_factory.mktemp("project")
    rows = [{"image_id": str(i), "label": "good", "path": f"{i}.png"} for i in range(19)]
    for number, row in enumerate(rows):
        write(folder / "bolts" / row["path"], number)
    table = pd.DataFrame(rows).assign(num_bytes=100, mask_path=None, split=["train"] * 12 + ["test"] * 7)
    prepare_images(folder / "bolts", table, GEOMETRY, folder / "data/prepared/detector")
    listing = {"name": "bolts", "source": str(folder / "bolts"), "layout": "table", "num_images": 19}
    (folder / "data/ingest").mkdir()
    (folder / "data/ingest/listing.json").write_text(json.dumps({**listing, "num_quarantined": 0}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        connect("bolts")
        with start_run("detector", {}, {}) as run_id:
            (folder / "models/detector").mkdir(parents=True)
            (folder / "models/detector/run.json").write_text(json.dumps({"run_id": run_id}))
        yield folder


def save_fitted(params, folder, name):
    """A detector of that name, fitted as far as it has a closed form; its threshold parts the images in two."""
    prepared = load_prepared(folder / "data/prepared/detector")
    section = params.train_detector.model_copy(update={"model": name})
    torch.manual_seed(0)
    detector = build_detector(name, build_config(section, prepared), "none")
    images = [torch.from_numpy(batch) for batch in prepared.read_batches(prepared.rows_of("train"), 4)]
    if isinstance(detector, FeatureDetector):
        fit_detector(detector, images, seed=0)
    with torch.inference_mode():
        threshold = float(detector(torch.cat(images))[0].median())
    save_detector(detector, {"geometry": GEOMETRY.to_json(), "threshold": threshold}, folder / "models/detector")
    return threshold


@pytest.mark.parametrize("name", sorted(FAMILY.keys() - {"tiled"}))
def test_the_file_answers_as_the_detector_for_every_test_image(params, project, name):
    threshold = save_fitted(params, project, name)
    export_detector(params)
    figures = json.loads((project / FIGURES).read_text())
    assert figures.pop("detector/export/largest_difference") < 1e-3
    assert figures == {
        "detector/export/agrees": True,
        "detector/export/num_different_decisions": 0,
        "detector/export/num_ties": figures["detector/export/num_ties"],
        "detector/export/num_images": 7,
        "detector/export/tolerance": 1e-3,
        "detector/export/num_bytes": (project / EXPORTED).stat().st_size,
    }
    values = {entry.key: entry.value for entry in onnx.load(project / EXPORTED).metadata_props}
    assert values["detector"] == name
    assert json.loads(values["threshold"]) == threshold
    assert Geometry(**json.loads(values["geometry"])) == GEOMETRY


def test_a_file_is_given_as_many_tiles_at_once_as_images_otherwise(params, project, monkeypatch):
    prepared = load_prepared(project / "data/prepared/detector")
    section = params.train_detector.model_copy(update={"model": "autoencoder", "tiles": 2})
    detector = build_detector("tiled", build_config(section, prepared), "none").eval()
    num_tiles = detector.config.rows * detector.config.columns
    extra = {"geometry": GEOMETRY.to_json(), "threshold": 0.1}
    save_detector(detector, extra, project / "models/detector")
    monkeypatch.setattr("loupe.data.images.MOST_AT_ONCE", 16)
    counts, run = [], export.ExportedModel.run

    def count(model, images):
        counts.append(len(images))
        return run(model, images)

    monkeypatch.setattr(export.ExportedModel, "run", count)
    export_detector(params)
    assert num_tiles > 1
    assert max(counts) == min(7, 16 // num_tiles)
    assert sum(counts) == 7


def test_a_file_that_answers_otherwise_is_recorded_and_fails_nothing(params, project, monkeypatch, caplog):
    save_fitted(params, project, "autoencoder")
    run = export.ExportedModel.run
    monkeypatch.setattr(export.ExportedModel, "run", lambda model, images: [-part for part in run(model, images)])
    with caplog.at_level(logging.INFO):
        export_detector(params)
    run_id = json.loads((project / "models/detector/run.json").read_text())["run_id"]
    assert json.loads((project / FIGURES).read_text())["detector/export/agrees"] is False
    assert mlflow.MlflowClient().get_run(run_id).data.metrics["detector/export/agrees"] == 0.0
    assert "will not be promoted" in caplog.messages[-1]
