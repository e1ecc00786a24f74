"""Trainings made again from their record, in a project whose stages take no time: real git, DVC and MLflow."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from loupe.errors import ConfigError, PipelineError, TrackingError
from loupe.reproduction import PLACE, compare_environments, compare_figures, compare_params, reproduce
from loupe.tracking.records import REPRODUCES_TAG, find_record
from loupe.tracking.runs import connect, start_run

GRAPH = """
stages:
  augment:
    cmd: python prepare.py
    deps: [../images, prepare.py]
    outs: [data/ingest, data/split]
  train_classifier:
    cmd: python train.py
    params: [seed]
    deps: [train.py, data/ingest, data/split]
    outs: [models/classifier]
  evaluate_classifier:
    cmd: python evaluate.py
    deps: [evaluate.py, models/classifier]
    metrics: [reports/metrics/classifier.json]
"""
PREPARE = """
import hashlib, pathlib
import pandas as pd

rows = [(hashlib.sha256(file.read_bytes()).hexdigest(), file.name) for file in pathlib.Path("../images").iterdir()]
table = pd.DataFrame(sorted(rows), columns=["image_id", "label"])
for name, values in {"ingest/manifest": table, "split/splits": table[["image_id"]].assign(split="train")}.items():
    path = pathlib.Path(f"data/{name}.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    values.to_parquet(path)
"""
# The accuracy is the seed, and what NOISE has in the environment, as a GPU might.
TRAIN = """
import json, os, pathlib
import yaml
from loupe.data.manifest import compute_data_digest, load_table
from loupe.stages.files import MANIFEST, SPLITS
from loupe.tracking.runs import connect, log_dataset, start_run

params = yaml.safe_load(open("params.yaml"))
rows = load_table(MANIFEST).merge(load_table(SPLITS), on="image_id")
folder = pathlib.Path("models/classifier")
folder.mkdir(parents=True)
connect("pets")
with start_run("classifier", params, {"task": "classifier"}) as run_id:
    log_dataset(rows, pathlib.Path("../images"), "pets", compute_data_digest(rows))
(folder / "run.json").write_text(json.dumps({"run_id": run_id}))
(folder / "accuracy.txt").write_text(str(params["seed"] / 7 + float(os.environ.get("NOISE", 0))))
"""
EVALUATE = """
import json, pathlib
from loupe.tracking.runs import connect, find_run, log_results

folder, file = pathlib.Path("models/classifier"), pathlib.Path("reports/metrics/classifier.json")
metrics = {"classifier/test/accuracy": float((folder / "accuracy.txt").read_text()), "classifier/test/num_images": 3}
file.parent.mkdir(parents=True, exist_ok=True)
file.write_text(json.dumps(metrics))
client = connect("pets")
log_results(client, find_run(client, folder / "run.json"), metrics={**metrics, "classifier/train/seconds": 3.5})
"""


def git(folder, *arguments):
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project with one training, whose seed is not committed; its images lie outside, under a relative path."""
    folder = tmp_path_factory.mktemp("above") / "project"
    for number in range(3):
        path = folder.parent / "images" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_text(str(number))
    folder.mkdir()
    files = {"dvc.yaml": GRAPH, "prepare.py": PREPARE, "train.py": TRAIN, "evaluate.py": EVALUATE}
    files |= {"params.yaml": "seed: 0\ningest: {source: ../images}\n", ".gitignore": "/ml*\n.mlflow.lock\n"}
    for name, content in files.items():
        (folder / name).write_text(content)
    git(folder, "init", "-q")
    git(folder, "config", "user.name", "test")
    git(folder, "config", "user.email", "test@example.invalid")
    subprocess.run([shutil.which("dvc"), "init", "-q"], cwd=folder, check=True)
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "start")
    (folder / "params.yaml").write_text("seed: 3\ningest: {source: ../images}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        subprocess.run([shutil.which("dvc"), "repro", "-q"], check=True, env=os.environ)
        yield folder


@pytest.fixture
def run_id(project):
    return json.loads((project / "models/classifier/run.json").read_text())["run_id"]


def list_traces(project):
    return [*(project / PLACE).glob("*"), *git(project, "worktree", "list").splitlines()[1:]]


def find_made(run_id):
    """The runs that make it again."""
    client = connect("pets")
    experiment = client.get_experiment_by_name("pets")
    return client.search_runs([experiment.experiment_id], f"tags.{REPRODUCES_TAG} = '{run_id}'")


def test_the_same_code_params_and_data_give_the_same_figures_in_a_run_of_their_own(project, run_id, capsys):
    status, lock = git(project, "status", "--porcelain"), (project / "dvc.lock").read_text()
    assert reproduce(run_id[:12], force=False, dry_run=False)
    told = capsys.readouterr().out.splitlines()
    assert told[-1].endswith("the same figures, all 2 of them")
    assert [line for line in told if line.startswith("> ")] == ["> python train.py", "> python evaluate.py"]
    (made,) = find_made(run_id)
    assert made.info.run_id != run_id
    assert made.data.params["seed"] == "3"
    assert (git(project, "status", "--porcelain"), (project / "dvc.lock").read_text()) == (status, lock)
    assert list_traces(project) == []
    assert [path.name for path in (project / ".dvc/cache/files/md5").iterdir() if len(path.name) > 2] == []
    # The copy's model is not given for the original.
    shutil.rmtree(project / "models")
    subprocess.run([shutil.which("dvc"), "checkout", "-q"], check=True)
    assert json.loads((project / "models/classifier/run.json").read_text())["run_id"] == run_id


def test_figures_that_differ_are_named_and_the_command_exits_with_1(project, run_id):
    command = [sys.executable, "-m", "loupe.cli", "reproduce", run_id]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "NOISE": "0.125"})
    assert answer.returncode == 1, answer.stderr
    told = answer.stdout.split("made again as")[1].splitlines()
    assert told[0].endswith(": 1 of 2 figures differ")
    assert told[1:] == [
        "  classifier/test/accuracy: was 0.4285714286, is 0.5535714286",
        "Packages and device are the same.",
    ]


def test_other_data_are_said_before_anything_is_trained(project, run_id):
    known = len(find_made(run_id))
    added = project.parent / "images" / "3.png"
    added.write_text("3")
    try:
        with pytest.raises(ConfigError, match=r"^the data are not those of the run any more: .*; with --force"):
            reproduce(run_id, force=False, dry_run=False)
    finally:
        added.unlink()
    assert len(find_made(run_id)) == known
    assert list_traces(project) == []


def test_a_dry_run_says_how_and_does_nothing(project, run_id, capsys):
    commit = git(project, "rev-parse", "HEAD").strip()
    assert reproduce(run_id, force=False, dry_run=True)
    told = capsys.readouterr().out
    for wanted in (f"worktree add --detach {PLACE}", commit, "apply", "train_classifier", "../images"):
        assert wanted in told
    assert list_traces(project) == []


def start_training(**tags):
    with start_run("classifier", {}, {"task": "classifier", **tags}) as run_id:
        pass
    return run_id


def test_what_can_not_be_made_again_is_one_sentence(project, run_id):
    client = connect("pets")
    untested = start_training()
    gone = start_training(git_commit="0" * 40)
    client.log_metric(gone, "classifier/test/accuracy", 0.5)
    with pytest.raises(ZeroDivisionError), start_run("classifier", {}, {"task": "classifier"}) as failed:
        _ = 1 / 0
    for one, reason in (
        (untested, "was not tested: there are no figures to compare with"),
        (failed, "ended as FAILED: there are no figures"),
        (gone, f"commit {'0' * 40} of run {gone[:8]} is not in this repository"),
    ):
        with pytest.raises(TrackingError, match=reason):
            reproduce(one, force=False, dry_run=True)


def test_changes_that_nobody_recorded_take_force(project, run_id, capsys):
    client = connect("pets")
    experiment_id = client.get_run(run_id).info.experiment_id
    bare = client.create_run(experiment_id, tags=find_record(client, run_id).tags).info.run_id
    client.log_metric(bare, "classifier/test/accuracy", 0.5)
    client.set_terminated(bare)
    with pytest.raises(TrackingError, match="not committed and not recorded either; with --force"):
        reproduce(bare, force=False, dry_run=True)
    assert reproduce(bare, force=True, dry_run=True)
    assert "git -C" not in capsys.readouterr().out


def test_changes_that_do_not_fit_are_gits_sentence(project, run_id):
    client = connect("pets")
    wrong = start_training()
    client.log_text(wrong, "no patch at all", "code/changes.patch")
    client.log_metric(wrong, "classifier/test/accuracy", 0.5)
    with pytest.raises(PipelineError, match="`git apply` fails"):
        reproduce(wrong, force=False, dry_run=False)
    assert list_traces(project) == []


def test_params_are_compared_as_mlflow_writes_them():
    recorded = {
        "seed": "0",
        "train.rate": "1.0",
        "train.steps": "[1, 2]",
        "train.compile": "True",
        "chosen.rate": "9",
    }
    values = {"seed": 0, "train": {"rate": 1, "steps": [1, 2], "compile": True}, "drift": {"images": 3}}
    assert compare_params(recorded, values) == []
    assert compare_params(recorded, {**values, "seed": 1}) == ["seed is 1 and was '0'"]
    del values["train"]["steps"]
    assert compare_params(recorded, values) == ["train.steps is None and was '[1, 2]'"]


def test_figures_differ_where_one_is_lacking_or_more_than_rounded():
    assert compare_figures({"a": 0.1 + 0.2, "b": 0.0}, {"a": 0.3, "b": 0.0}) == {}
    assert compare_figures({"a": 0.3, "b": 1.0}, {"a": 0.300001, "c": 2.0}) == {
        "a": (0.3, 0.300001),
        "b": (1.0, None),
        "c": (None, 2.0),
    }


def test_other_packages_and_devices_are_reasons():
    was, now = {"torch": "2.11", "device": "one"}, {"torch": "2.12", "device": "one", "cuda": "13"}
    assert compare_environments(was, was) == []
    assert compare_environments(was, now) == ["cuda was None and is 13", "torch was 2.11 and is 2.12"]
    assert compare_environments({}, now) == ["the packages and the device of the run were not recorded"]
