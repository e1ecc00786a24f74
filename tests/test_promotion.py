"""Promotion in a real registry: what is registered, who becomes champion, and what is said of it."""

import json

import pandas as pd
import pytest
import torch

from loupe.config import load_params
from loupe.data.images import Geometry
from loupe.data.manifest import save_table
from loupe.models.classifiers import ClassifierConfig, build_classifier, save_classifier
from loupe.promotion import promote
from loupe.tracking import registry
from loupe.tracking.runs import connect, start_run

GEOMETRY = Geometry(24, 24, 3, 20, 20, 32, 32, "squash", "bilinear")
AGREES = {
    "agrees": True,
    "largest_difference": 4e-6,
    "num_different_decisions": 0,
    "num_ties": 0,
    "num_images": 6,
    "tolerance": 1e-3,
    "num_bytes": 250_000,
}
DISAGREES = {**AGREES, "agrees": False, "largest_difference": 0.25, "num_different_decisions": 2}
DISAGREEMENT = (
    "accuracy 0.9000 does not count, as the exported model disagrees with the trained one: 2 of 6 images are decided "
    "otherwise, and probabilities differ by up to 0.25 where 0.001 is allowed"
)


class Project:
    """A folder with six test images, in which classifiers are trained, tested, exported and promoted."""

    def __init__(self, folder, name, params):
        self.folder, self.params, self.client = folder, params, connect(name)

    def train(self, accuracy, exported):
        """A new classifier and its run, with the figures that evaluation and export would have left."""
        config = ClassifierConfig("lenet5", ["cat", "dog"], (20, 20), (32, 32), (0.5,) * 3, (0.5,) * 3)
        folder = self.folder / "models/classifier"
        save_classifier(build_classifier(config, "none"), {"geometry": GEOMETRY.to_json()}, folder)
        with start_run("classifier", {}, {}) as run_id:
            model_uri = registry.log_model(folder, sorted((self.folder / "pets").iterdir())[:2])
        self.save("models/classifier/run.json", {"run_id": run_id, "model_uri": model_uri})
        self.save("reports/metrics/classifier.json", {"classifier/test/accuracy": accuracy})
        self.export(exported)

    def export(self, exported):
        values = {f"classifier/export/{name}": value for name, value in exported.items()}
        self.save("reports/metrics/classifier_export.json", values)

    def save(self, name, values):
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(json.dumps(values))

    def promote(self):
        """What is written of the classifier, and the tags of its version in the registry."""
        promote(self.params)
        outcome = json.loads((self.folder / "reports/promotion.json").read_text())["classifier"]
        return outcome, self.client.get_model_version(outcome["model"], outcome["version"]).tags


@pytest.fixture(scope="module")
def open_project(tmp_path_factory, repository, write):
    """Begins anew, under a name, in one folder and one store."""
    folder = tmp_path_factory.mktemp("project")
    rows = [{"image_id": str(i), "label": label, "path": f"{i}.png"} for i, label in enumerate(["cat", "dog"] * 3)]
    for number, row in enumerate(rows):
        write(folder / "pets" / row["path"], number)
    (folder / "data/prepared/classifier").mkdir(parents=True)
    save_table(pd.DataFrame(rows).assign(split="test"), folder / "data/prepared/classifier/index.parquet")

    def begin(name):
        torch.manual_seed(0)
        project = Project(folder, name, load_params(repository / "params.yaml"))
        listing = {"name": name, "source": str(folder / "pets"), "layout": "table", "num_images": 6}
        project.save("data/ingest/listing.json", {**listing, "num_quarantined": 0})
        project.save("models/detector/skipped.json", {"reason": "no class is normal"})
        return project

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        yield begin


def test_the_first_classifier_is_no_champion_where_its_export_disagrees(open_project):
    project = open_project("first")
    project.train(0.9, DISAGREES)
    outcome, tags = project.promote()
    assert (outcome["version"], outcome["champion_version"]) == ("1", None)
    assert outcome["reason"] == tags["promotion_reason"] == DISAGREEMENT
    assert tags["promotion"] == "kept out"
    assert registry.find_champion(project.client, "first-classifier") is None
    assert str(project.client.get_model_version_by_alias("first-classifier", "challenger").version) == "1"


def test_it_is_decided_anew_once_the_export_agrees(open_project):
    project = open_project("anew")
    project.train(0.9, DISAGREES)
    project.promote()
    project.export(AGREES)
    outcome, tags = project.promote()
    assert (outcome["version"], outcome["champion_version"], tags["promotion"]) == ("1", "1", "promoted")
    assert outcome["reason"] == "accuracy 0.9000 passes the floor of 0.6, and there was no champion"


def test_a_better_classifier_does_not_take_the_champions_place_where_its_export_disagrees(open_project):
    project = open_project("better")
    project.train(0.8, AGREES)
    project.promote()
    project.train(0.9, DISAGREES)
    outcome, tags = project.promote()
    assert (outcome["version"], outcome["champion_version"], tags["promotion"]) == ("2", "1", "kept out")
    assert outcome["reason"] == tags["promotion_reason"] == DISAGREEMENT


def test_a_better_classifier_whose_export_agrees_does(open_project):
    project = open_project("agreeing")
    for version, accuracy in (("1", 0.9), ("2", 1.01)):  # above any that the first can have
        project.train(accuracy, AGREES)
        outcome, tags = project.promote()
        assert (outcome["version"], outcome["champion_version"], tags["promotion"]) == (version, version, "promoted")
    assert "on the same images" in outcome["reason"]
