"""Promotion in a real registry: what is registered, who becomes champion, what is said of it, and what people do."""

import io
import json

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from PIL import Image
from rich.console import Console
from sklearn.metrics import roc_auc_score

from loupe import history, promotion
from loupe.config import load_params
from loupe.data.images import Geometry
from loupe.data.manifest import save_table
from loupe.errors import ConfigError, DataError, TrackingError
from loupe.models.classifiers import ClassifierConfig, build_classifier, save_classifier
from loupe.models.detectors.autoencoder import Autoencoder, AutoencoderConfig
from loupe.models.detectors.base import save_detector
from loupe.tracking import logged_models, registry
from loupe.tracking.audit import load_audit
from loupe.tracking.runs import connect, log_results, start_run

GEOMETRY = Geometry(32, 32, 3, 32, 32, 32, 32, "squash", "bilinear")
LABELS = ["cat", "dog"] * 15  # cats are dark, and dogs are bright
AGREES = {
    "agrees": True,
    "largest_difference": 4e-6,
    "num_different_decisions": 0,
    "num_ties": 0,
    "num_images": 30,
    "tolerance": 1e-3,
    "num_bytes": 250_000,
}
DISAGREES = {**AGREES, "agrees": False, "largest_difference": 0.25, "num_different_decisions": 2}
DISAGREEMENT = (
    "the exported model disagrees with the trained one: 2 of 30 images are decided otherwise, and scores differ by up "
    "to 0.25 where 0.001 is allowed"
)


@pytest.fixture(scope="module")
def networks():
    """Classifiers by what they call a dark and a bright image, each learnt in some steps."""
    config = ClassifierConfig("lenet5", ["cat", "dog"], (32, 32), (32, 32), (0.5,) * 3, (0.5,) * 3)
    shades = torch.linspace(0, 255, 64)
    images = shades.byte()[:, None, None, None].expand(64, 3, 32, 32)

    def learn(dark, bright):
        torch.manual_seed(0)
        network = build_classifier(config, "none")
        optimizer = torch.optim.Adam(network.parameters(), 0.003)
        targets = torch.where(shades < 128, dark, bright)
        for _ in range(60):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(images), targets).backward()
            optimizer.step()
        return network.eval()

    return {"right": learn(0, 1), "always cat": learn(0, 0), "wrong": learn(1, 0)}


class Project:
    """A folder with thirty test images, in which classifiers are trained, exported and promoted."""

    def __init__(self, folder, name, params, networks):
        self.folder, self.params, self.networks, self.client = folder, params, networks, connect(name)
        self.name = f"{name}-classifier"

    def train(self, kind, exported=AGREES, seen=()):
        """A new classifier and its run, with what export would have left; `seen` are images it learnt from."""
        folder = self.folder / "models/classifier"
        folder.mkdir(parents=True, exist_ok=True)
        save_table(pd.DataFrame({"image_id": seen}, dtype="str"), folder / "seen.parquet")
        save_classifier(self.networks[kind], {"geometry": GEOMETRY.to_json()}, folder)
        self.log("classifier", folder)
        self.evaluate("classifier")
        self.export("classifier", exported)

    def log(self, task, folder):
        with start_run(task, {}, {"task": task}) as run_id:
            model_uri = logged_models.log_model(folder, sorted((self.folder / "pets").iterdir())[:2])
        self.save(f"models/{task}/run.json", {"run_id": run_id, "model_uri": model_uri})

    def evaluate(self, task):
        self.report(task, task, f"reports/{task}", {f"{task}/test/num_images": len(LABELS)})

    def export(self, task, exported):
        figures = {f"{task}/export/{name}": value for name, value in exported.items()}
        self.report(task, f"{task}_export", f"models/exported/{task}", figures)

    def report(self, task, name, folder, figures):
        """Figures as a stage leaves them, in its file and in the model's run."""
        self.save(f"reports/metrics/{name}.json", figures)
        run = json.loads((self.folder / f"models/{task}/run.json").read_text())
        self.save(f"{folder}/run.json", run)
        log_results(self.client, run["run_id"], metrics=figures)

    def save(self, name, values):
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(json.dumps(values))

    def promote(self, **rules):
        """What is written of the classifier, under the rules of params.yaml with some changed."""
        section = self.params.promote
        section = section.model_copy(update={"classifier": section.classifier.model_copy(update=rules)})
        promotion.promote(self.params.model_copy(update={"promote": section}))
        return json.loads((self.folder / "reports/promotion.json").read_text())["classifier"]

    def aliases(self):
        known = self.client.get_registered_model(self.name).aliases
        return {alias: str(version) for alias, version in known.items()}

    def actions(self):
        return [entry.action for entry in load_audit(self.client, self.name)]

    def history(self):
        """The table of the audit as a person sees it."""
        said = io.StringIO()
        Console(file=said, width=200).print(history.build_history(self.name, load_audit(self.client, self.name)))
        return said.getvalue()


@pytest.fixture(scope="module")
def open_project(tmp_path_factory, repository, networks):
    """Begins anew, under a name, in one folder and one store."""
    folder = tmp_path_factory.mktemp("project")
    rows = [{"image_id": str(i), "label": label, "path": f"{i:02d}.png"} for i, label in enumerate(LABELS)]
    (folder / "pets").mkdir()
    for i, row in enumerate(rows):
        shade = 2 * i if row["label"] == "cat" else 255 - 2 * i
        Image.new("RGB", (40, 30), (shade,) * 3).save(folder / "pets" / row["path"])
    for task in ("classifier", "detector"):
        (folder / "data/prepared" / task).mkdir(parents=True)
        save_table(pd.DataFrame(rows).assign(split="test"), folder / "data/prepared" / task / "index.parquet")
    (folder / "data/ingest").mkdir()
    save_table(pd.DataFrame(rows), folder / "data/ingest/manifest.parquet")

    def begin(name):
        torch.manual_seed(0)
        project = Project(folder, name, load_params(repository / "params.yaml"), networks)
        listing = {"name": name, "source": str(folder / "pets"), "layout": "table", "num_images": len(rows)}
        project.save("data/ingest/listing.json", {**listing, "num_quarantined": 0})
        project.save("reports/validation.json", {"findings": []})
        project.save("models/detector/skipped.json", {"reason": "no class is normal"})
        return project

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        yield begin


def test_the_first_classifier_is_no_champion_where_its_export_disagrees_and_is_once_it_agrees(open_project):
    project = open_project("first")
    project.train("right", DISAGREES)
    outcome = project.promote()
    assert (outcome["version"], outcome["champion_version"], outcome["decision"]) == ("1", None, "kept")
    assert outcome["reason"] == f"accuracy 1.0000 does not count, as {DISAGREEMENT}"
    assert project.aliases() == {"challenger": "1"}
    project.export("classifier", AGREES)
    outcome = project.promote()
    assert (outcome["version"], outcome["champion_version"], outcome["decision"]) == ("1", "1", "promoted")
    assert outcome["reason"] == "accuracy 1.0000 passes the floor of 0.6, and there was no champion"
    tags = project.client.get_model_version(project.name, "1").tags
    assert (tags["promotion"], tags["promotion_reason"]) == ("promoted", outcome["reason"])


def test_what_was_promoted_and_is_champion_no_more_is_promoted_again_where_there_is_none(open_project):
    project = open_project("lost")
    project.train("right")
    assert project.promote()["decision"] == "promoted"
    project.client.delete_registered_model_alias(project.name, "champion")
    outcome = project.promote()
    assert (outcome["decision"], outcome["champion_version"]) == ("promoted", "1")
    assert project.aliases()["champion"] == "1"


def test_a_model_of_another_data_set_is_refused(open_project):
    project = open_project("ours")
    project.train("right")
    project = open_project("theirs")
    with pytest.raises(DataError, match=r"the classifier was trained on ours, and .* is of theirs"):
        project.promote()
    with pytest.raises(MlflowException):
        project.client.get_registered_model("theirs-classifier")


def test_a_better_classifier_takes_the_champions_place_unless_its_export_disagrees(open_project):
    project = open_project("better")
    project.train("always cat")
    project.promote(floor=0.4, worst_floor=0.0)
    project.train("right", DISAGREES)
    assert DISAGREEMENT in project.promote()["reason"]
    assert project.aliases() == {"champion": "1", "challenger": "2"}
    project.export("classifier", AGREES)
    outcome = project.promote(max_latency_growth=100.0)
    assert outcome["reason"].startswith("accuracy 1.0000 is surely above the champion's 0.5000 on the same images: ")
    assert project.aliases() == {"champion": "2", "challenger": "2", "previous-champion": "1"}
    assert (outcome["promotion/challenger"], outcome["promotion/champion"]) == (1.0, 0.5)
    assert outcome["promotion/difference_low"] > 0
    assert outcome["promotion/num_bytes"] == outcome["promotion/champion_num_bytes"] > 0
    assert outcome["promotion/latency_ms"] > 0


def test_images_that_the_champion_learnt_from_are_not_compared(open_project):
    """As after a change of seed, which divides the images anew."""
    project = open_project("seen")
    known = [str(i) for i in range(len(LABELS) - 20)]
    project.train("always cat", seen=[*known, "another"])
    project.promote(floor=0.4, worst_floor=0.0)
    project.train("right")
    outcome = project.promote(max_latency_growth=100.0)
    assert outcome["decision"] == "promoted"
    assert "; on the 20 of 30 test images that the champion did not learn from, 1.0000 is surely" in outcome["reason"]
    assert (outcome["promotion/num_images"], outcome["promotion/num_compared"]) == (30, 20)


def test_a_champion_that_does_not_say_what_it_learnt_from_is_compared_on_all_and_warned_of(open_project, caplog):
    project = open_project("old")
    project.train("always cat")
    (project.folder / "models/classifier/seen.parquet").unlink()
    project.log("classifier", project.folder / "models/classifier")
    project.evaluate("classifier")
    project.export("classifier", AGREES)
    project.promote(floor=0.4, worst_floor=0.0)
    project.train("right")
    caplog.clear()
    assert project.promote(max_latency_growth=100.0)["promotion/num_compared"] == len(LABELS)
    assert "does not say what it learnt from" in caplog.text


def test_a_worse_classifier_is_kept_out_by_its_worst_class_and_by_the_champion(open_project):
    project = open_project("worse")
    project.train("right")
    project.promote()
    project.train("always cat")
    outcome = project.promote(floor=0.4, max_latency_growth=100.0)
    assert (outcome["decision"], outcome["champion_version"]) == ("kept", "1")
    assert outcome["reason"] == (
        "accuracy 0.5000 does not count, as its recall of dog, 0.0000, is below the floor of 0.3 for the worst"
    )
    outcome = project.promote(floor=0.4, worst_floor=0.0, max_latency_growth=100.0)
    assert "accuracy 0.5000 is not above the champion's 1.0000 on the same images" in outcome["reason"]
    assert project.aliases() == {"champion": "1", "challenger": "2"}


def test_what_may_be_luck_is_undecided_and_the_same_is_not_asked_twice(open_project):
    project = open_project("luck")
    project.train("always cat")
    project.promote(floor=0.4, worst_floor=0.0)
    project.train("right")
    rules = {"margin": 0.5, "max_latency_growth": 100.0}
    outcome = project.promote(**rules)
    assert (outcome["decision"], outcome["champion_version"]) == ("undecided", "1")
    assert project.promote(**rules) == outcome
    assert project.actions() == ["promoted", "done", "undecided"]
    assert project.promote(max_latency_growth=100.0)["decision"] == "promoted"  # other rules are another question


def test_what_was_trained_and_not_tested_or_exported_is_refused_before_anything_is_registered(open_project):
    project = open_project("untested")
    project.train("right")
    project.promote()
    metrics = project.folder / "reports/metrics"
    known = {path: path.read_text() for path in metrics.iterdir()}
    project.train("wrong")
    for name, done in (("classifier", "tested"), ("classifier_export", "exported")):
        path = metrics / f"{name}.json"
        content = path.read_text()
        path.unlink()
        refuse_all(project, f"the classifier was trained and not {done} since, as reports/metrics/{name}.json")
        path.write_text(content)
    project.log("classifier", project.folder / "models/classifier")  # trained anew, and the old figures are there
    figures = json.loads((metrics / "classifier.json").read_text())
    run_id = json.loads((project.folder / "models/classifier/run.json").read_text())["run_id"]
    log_results(project.client, run_id, metrics=figures)  # once tested, and then the other's were brought back
    refuse_all(project, "the classifier was trained and not tested since")
    project.evaluate("classifier")
    refuse_all(project, "the classifier was trained and not exported since")
    assert {path: path.read_text() for path in metrics.iterdir()} == known
    assert project.aliases() == {"champion": "1", "challenger": "1"}
    assert project.actions() == ["promoted", "done"]


def refuse_all(project, sentence):
    for way in (
        lambda: promotion.promote(project.params),
        lambda: promotion.promote(project.params, dry_run=True),
        lambda: promotion.override("classifier", "line 3 needs it"),
    ):
        with pytest.raises(DataError, match=sentence):
            way()


def test_a_model_is_not_promoted_where_its_card_or_the_other_model_fails(open_project):
    project = open_project("halves")
    project.train("right")
    (project.folder / "reports/validation.json").unlink()
    refuse_all(project, r"reports/validation\.json is missing, which a model card is made from: `dvc repro` writes it")
    project.save("reports/validation.json", {"findings": []})
    (project.folder / "models/detector/skipped.json").unlink()
    (project.folder / "models/detector/run.json").unlink(missing_ok=True)
    with pytest.raises(DataError, match="no detector was trained here"):
        promotion.promote(project.params)
    with pytest.raises(TrackingError, match="MLflow has no registered model 'halves-classifier'"):
        project.actions()


def test_a_dry_run_says_what_would_be_and_leaves_no_trace(open_project, caplog):
    project = open_project("dry")
    project.train("right")
    caplog.set_level("INFO")
    promotion.promote(project.params, dry_run=True)
    assert "would be promoted: accuracy 1.0000 passes the floor of 0.6" in caplog.text
    with pytest.raises(TrackingError, match="MLflow has no registered model 'dry-classifier'"):
        project.actions()
    project.promote()
    promotion.promote(project.params, dry_run=True)
    assert "dry-classifier version 1: is champion already: accuracy 1.0000 passes the floor" in caplog.text
    project.train("wrong")
    promotion.promote(project.params, dry_run=True)
    assert "would be kept: accuracy 0.0000 is below the floor" in caplog.text
    assert project.aliases() == {"champion": "1", "challenger": "1"}
    assert project.actions() == ["promoted", "done"]


def test_a_person_overrides_with_a_reason_and_never_a_disagreement(open_project):
    project = open_project("override")
    project.train("right")
    project.promote()
    project.train("wrong", DISAGREES)
    assert project.promote()["decision"] == "kept"
    with pytest.raises(ConfigError, match="--reason must say why"):
        promotion.override("classifier", " ")
    with pytest.raises(ConfigError, match="the task must be classifier or detector, got 'clasifier'"):
        promotion.override("clasifier", "line 3 needs it")
    with pytest.raises(TrackingError, match="is not promoted by override either, as the exported model disagrees"):
        promotion.override("classifier", "line 3 needs it")
    project.export("classifier", AGREES)
    promotion.override("classifier", "line 3 needs it")
    assert project.aliases() == {"champion": "2", "challenger": "2", "previous-champion": "1"}
    entry = load_audit(project.client, project.name)[-2]
    assert (entry.action, entry.why, entry.champion_from) == ("overridden", "line 3 needs it", "1")
    assert entry.who
    with pytest.raises(TrackingError, match="version 2 of override-classifier is champion already"):
        promotion.override("classifier", "again")
    assert project.promote()["reason"] == "line 3 needs it"


def test_what_was_rolled_back_comes_back_by_override_alone(open_project, caplog):
    project = open_project("rollback")
    project.train("always cat")
    project.promote(floor=0.4, worst_floor=0.0)
    project.train("right")
    project.promote(max_latency_growth=100.0)
    with pytest.raises(ConfigError, match="--reason must say why"):
        history.roll_back("classifier", "")
    history.roll_back(None, "it flags every tile")  # the only task that has a champion
    assert project.aliases() == {"champion": "1", "challenger": "2"}
    outcome = project.promote(floor=0.9, max_latency_growth=100.0)
    assert (outcome["decision"], outcome["champion_version"]) == ("kept", "1")
    assert "rolled it back (it flags every tile), and only `loupe promote --override` undoes that" in outcome["reason"]
    caplog.set_level("INFO")
    promotion.promote(project.params, dry_run=True)
    assert "rollback-classifier version 2: would be kept: " in caplog.text
    assert caplog.text.count("and only `loupe promote --override` undoes that; the champion stays version 1") == 1
    with pytest.raises(TrackingError, match="no earlier champion than version 1"):
        history.roll_back("classifier", "and that one")
    promotion.override("classifier", "it was the lamp")
    assert project.aliases() == {"champion": "2", "challenger": "2", "previous-champion": "1"}
    assert project.actions() == ["promoted", "done"] * 2 + ["rolled back", "done", "overridden", "done"]
    said = project.history()
    for words in ("The audit of rollback-classifier", "nobody → 1", "rolled back 2", "2 → 1", "it was the lamp"):
        assert words in said
    assert "done" not in said


def test_a_decision_that_was_overtaken_is_said_and_asked_again(open_project, monkeypatch):
    project = open_project("overtaken")
    project.train("always cat")
    project.promote(floor=0.4, worst_floor=0.0)
    project.train("right")
    decide = promotion.decide_promotion

    def decide_slowly(*arguments):
        """Meanwhile somebody makes this version champion."""
        monkeypatch.undo()
        project.client.set_registered_model_alias(project.name, "champion", "2")
        return decide(*arguments)

    monkeypatch.setattr("loupe.promotion.decide_promotion", decide_slowly)
    outcome = project.promote(max_latency_growth=100.0)
    assert (outcome["decision"], outcome["champion_version"]) == ("undecided", "2")
    assert "while this was decided, version 2 became champion; nothing was moved" in outcome["reason"]
    assert project.promote()["reason"].startswith("the alias was moved outside of Loupe")


def test_a_detector_is_judged_by_the_scores_of_the_model_that_mlflow_loads(open_project):
    project = open_project("detector")
    project.train("right")
    (project.folder / "models/detector/skipped.json").unlink()
    tasks = {"labels": ["cat", "dog"], "normal_label": "cat", "no_classifier_because": None}
    project.save("data/split/tasks.json", {**tasks, "no_detector_because": None})
    autoencoder = Autoencoder(AutoencoderConfig(3, 4, 2, (32, 32), (32, 32)))
    save_detector(autoencoder, {"geometry": GEOMETRY.to_json(), "threshold": 0.05}, project.folder / "models/detector")
    project.log("detector", project.folder / "models/detector")
    project.evaluate("detector")
    project.export("detector", AGREES)
    project.promote()
    outcome = json.loads((project.folder / "reports/promotion.json").read_text())["detector"]
    version = registry.find_version(project.client, "detector-detector", outcome["version"])
    scores = logged_models.predict_with(version, sorted((project.folder / "pets").iterdir()))["anomaly_score"]
    expected = roc_auc_score(np.array(LABELS) == "dog", scores)
    assert outcome["promotion/challenger"] == outcome["promotion/worst"] == pytest.approx(expected)
    assert outcome["reason"].startswith(f"image_auroc {expected:.4f} ")


def test_a_version_is_forgotten_by_task_and_number(open_project):
    project = open_project("forget")
    project.train("wrong")
    project.promote()
    project.train("right")
    project.promote()
    with pytest.raises(TrackingError, match="version 2 of forget-classifier is challenger and champion, and stays"):
        history.forget("classifier", "2", "no longer needed")
    history.forget("classifier", "1", "no longer needed")
    assert registry.find_version(project.client, project.name, "1") is None
    assert "forgotten 1" in project.history()


def test_without_data_or_a_model_the_way_is_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="`loupe run` makes it"):
        history.show_history(None)
    (tmp_path / "data/ingest").mkdir(parents=True)
    listing = {"name": "pets", "source": "pets", "layout": "table", "num_images": 1, "num_quarantined": 0}
    (tmp_path / "data/ingest/listing.json").write_text(json.dumps(listing))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    with pytest.raises(DataError, match="no classifier was trained here"):
        promotion.override("classifier", "line 3 needs it")
