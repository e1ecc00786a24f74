"""What a training leaves in MLflow beside its model, on a real store."""

from dataclasses import dataclass

import pandas as pd
import pytest

from loupe.config import load_params
from loupe.data.manifest import compute_data_digest, save_table
from loupe.errors import TrackingError
from loupe.stages.entry import save_json
from loupe.stages.files import (
    AUGMENT,
    CONTACT_SHEET,
    DATA_REPORT,
    LISTING,
    MANIFEST,
    MODELS,
    POLICY,
    RUN,
    SPLITS,
    VALIDATION,
    WORST_IMAGES,
)
from loupe.stages.recording import record_stage_times, record_training
from loupe.tracking.runs import connect

# A folder is a source to MLflow twice over, of the same kind; stages run without its warnings.
pytestmark = pytest.mark.filterwarnings("ignore:The specified dataset source can be interpreted in multiple ways")


@dataclass(frozen=True)
class Recipe:
    batch_size: int = 16


@pytest.fixture
def params(tmp_path, repository, monkeypatch):
    """Those of the project, in a folder with a store and with what the stages before a training wrote."""
    params = load_params(repository / "params.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    save_json({"name": "pets", "source": "pets", "layout": "mvtec", "num_images": 2, "num_quarantined": 0}, LISTING)
    save_table(pd.DataFrame({"image_id": ["a", "b", "b"], "label": ["cat", "dog", "dog"]}), MANIFEST)
    save_table(pd.DataFrame({"image_id": ["a", "b"], "split": ["train", "test"]}), SPLITS)
    folder = AUGMENT / "classifier"
    for path in (folder / CONTACT_SHEET, folder / POLICY, VALIDATION, WORST_IMAGES, DATA_REPORT):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return params


def test_a_training_has_its_params_seed_data_and_times(params):
    with record_training("classifier", params, Recipe()) as run_id:
        save_json({"run_id": run_id}, MODELS / "classifier" / RUN)
    times = {"train_classifier": {"seconds": 7.0, "unchanged": False}, "prepare": {"seconds": 1.0, "unchanged": True}}
    record_stage_times(times)
    client = connect("pets")
    data = client.get_run(run_id).data
    assert (data.params["seed"], data.params["chosen.batch_size"]) == (str(params.seed), "16")
    rows = pd.DataFrame({"image_id": ["a", "b"], "label": ["cat", "dog"], "split": ["train", "test"]})
    assert data.tags["data_digest"] == compute_data_digest(rows)
    assert data.metrics["classifier/train/seconds"] > 0
    assert data.metrics["stages/train_classifier/seconds"] == 7
    assert "stages/prepare/seconds" not in data.metrics
    assert {entry.path for entry in client.list_artifacts(run_id)} >= {"environment", "pictures", "results"}


def test_a_training_that_fails_has_no_time(params):
    with pytest.raises(TrackingError), record_training("classifier", params, Recipe()) as run_id:
        raise TrackingError("no more")
    run = connect("pets").get_run(run_id)
    assert (run.info.status, run.data.tags["failure"]) == ("FAILED", "no more")
    assert "classifier/train/seconds" not in run.data.metrics


def test_times_of_a_training_that_another_store_holds_are_refused(params):
    save_json({"run_id": "0" * 32}, MODELS / "classifier" / RUN)
    with pytest.raises(TrackingError, match="does not hold"):
        record_stage_times({})
