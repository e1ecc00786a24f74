import json
import logging

import mlflow
import numpy as np
import onnx
import pandas as pd
import pytest
import torch

from loupe.config import load_params
from loupe.data.images import Geometry
from loupe.data.prepare import load_prepared, prepare_images
from loupe.models import export
from loupe.models.classifiers import ClassifierConfig, build_classifier, save_classifier
from loupe.stages.export_classifier import export_classifier
from loupe.tracking.runs import connect, start_run

GEOMETRY = Geometry(24, 24, 3, 20, 20, 32, 32, "squash", "bilinear")
EXPORTED = "models/exported/classifier/model.onnx"
FIGURES = "reports/metrics/classifier_export.json"


@pytest.fixture(scope="module")
def params(repository):
    return load_params(repository / "params.yaml")


@pytest.fixture(scope="module")
def project(tmp_path_factory, write):
    """A folder in which a classifier was trained; of the 12 images that are prepared, 7 test it."""
    folder = tmp_path_factory.mktemp("project")
    rows = [{"image_id": str(i), "label": label, "path": f"{i}.png"} for i, label in enumerate(["cat", "dog"] * 6)]
    for number, row in enumerate(rows):
        write(folder / "pets" / row["path"], number)
    table = pd.DataFrame(rows).assign(num_bytes=100, mask_path=None, split=["train"] * 5 + ["test"] * 7)
    prepare_images(folder / "pets", table, GEOMETRY, folder / "data/prepared/classifier")
    listing = {"name": "pets", "source": str(folder / "pets"), "layout": "table", "num_images": 12}
    (folder / "data/ingest").mkdir()
    (folder / "data/ingest/listing.json").write_text(json.dumps({**listing, "num_quarantined": 0}))
    torch.manual_seed(0)
    config = ClassifierConfig("lenet5", ["cat", "dog"], (20, 20), (32, 32), (0.5,) * 3, (0.5,) * 3)
    save_classifier(build_classifier(config, "none"), {"geometry": GEOMETRY.to_json()}, folder / "models/classifier")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        connect("pets")
        with start_run("classifier", {}, {}) as run_id:
            (folder / "models/classifier/run.json").write_text(json.dumps({"run_id": run_id}))
        yield folder


def load_figures(folder):
    return json.loads((folder / FIGURES).read_text())


def load_record(folder):
    """Metrics of the run that trained the classifier, and the artifacts that are exported models."""
    run_id = json.loads((folder / "models/classifier/run.json").read_text())["run_id"]
    client = mlflow.MlflowClient()
    return client.get_run(run_id).data.metrics, [file.path for file in client.list_artifacts(run_id, "exported")]


def test_the_file_answers_as_the_network_for_every_test_image(params, project):
    export_classifier(params)
    figures = load_figures(project)
    assert figures.pop("classifier/export/largest_difference") < 1e-4
    assert figures == {
        "classifier/export/agrees": True,
        "classifier/export/num_different_decisions": 0,
        "classifier/export/num_ties": 0,
        "classifier/export/num_images": 7,
        "classifier/export/tolerance": 1e-3,
        "classifier/export/num_bytes": (project / EXPORTED).stat().st_size,
    }
    metrics, artifacts = load_record(project)
    assert {name: metrics[name] for name in figures} == figures
    assert artifacts == ["exported/model.onnx"]


def test_the_file_says_how_images_are_prepared_for_it(params, project):
    export_classifier(params)
    values = {entry.key: entry.value for entry in onnx.load(project / EXPORTED).metadata_props}
    assert Geometry(**json.loads(values["geometry"])) == GEOMETRY
    assert json.loads(values["labels"]) == ["cat", "dog"]


def test_a_file_that_answers_otherwise_is_recorded_and_fails_nothing(params, project, monkeypatch, caplog):
    run = export.ExportedModel.run
    monkeypatch.setattr(export.ExportedModel, "run", lambda model, images: [run(model, images)[0][:, ::-1]])
    with caplog.at_level(logging.INFO):
        export_classifier(params)
    figures = load_figures(project)
    assert figures["classifier/export/agrees"] is False
    assert figures["classifier/export/num_different_decisions"] == 7
    assert load_record(project)[0]["classifier/export/agrees"] == 0.0
    assert "will not be promoted" in caplog.messages[-1]


def test_test_images_alone_are_compared_a_part_at_a_time(params, project, monkeypatch):
    seen = []
    run = export.ExportedModel.run
    monkeypatch.setattr(export.ExportedModel, "run", lambda model, images: seen.append(images) or run(model, images))
    monkeypatch.setattr("loupe.stages.export_classifier.BATCH_SIZE", 3)
    export_classifier(params)
    prepared = load_prepared(project / "data/prepared/classifier")
    assert [len(images) for images in seen] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(seen).transpose(0, 2, 3, 1), prepared.images[prepared.rows_of("test")])
    assert load_figures(project)["classifier/export/agrees"]
