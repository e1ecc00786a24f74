"""What is left of the stages of a task that the images don't allow."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import grimp
import pytest
import yaml

from loupe.config import load_params
from loupe.stages.__main__ import OF_TASKS
from loupe.stages.skipping import find_reason, skip

LISTING = {"name": "tiles", "source": "tiles", "layout": "mvtec", "num_images": 9, "num_quarantined": 0}
REASON = "there is one class to train on (<b>good</b>)"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """As the split stage leaves it where nothing can be trained."""
    monkeypatch.chdir(tmp_path)
    tasks = {"labels": [], "normal_label": None, "no_classifier_because": REASON, "no_detector_because": REASON}
    for name, values in (("data/split/tasks.json", tasks), ("data/ingest/listing.json", LISTING)):
        Path(name).parent.mkdir(parents=True)
        Path(name).write_text(json.dumps(values))
    return tmp_path


@pytest.fixture(scope="module")
def params(repository):
    return load_params(repository / "params.yaml")


@pytest.fixture(scope="module")
def outs(repository):
    """By stage: what DVC looks for after it."""
    stages = yaml.safe_load((repository / "dvc.yaml").read_text())["stages"]
    return {name: stage["outs"] + stage.get("metrics", []) for name, stage in stages.items()}


@pytest.mark.parametrize("task", ["classifier", "detector"])
def test_all_outs_are_there_and_say_why(project, outs, params, task):
    for verb in ("train", "evaluate", "export"):
        assert find_reason(verb, task) == REASON
        skip(verb, task, REASON, params)
        assert [out for out in outs[f"{verb}_{task}"] if not (project / out).exists()] == []
    assert json.loads((project / f"models/{task}/skipped.json").read_text()) == {"reason": REASON}
    assert list((project / f"models/exported/{task}").iterdir()) == []
    for name in (task, f"{task}_export"):
        assert json.loads((project / f"reports/metrics/{name}.json").read_text()) == {}
    page = (project / f"reports/{task}.html").read_text()
    assert f"No {task} was trained: there is one class to train on (&lt;b&gt;good&lt;/b&gt;)." in page


@pytest.mark.parametrize("verb", ["train", "evaluate", "export"])
def test_what_the_images_allow_is_not_skipped(project, verb):
    path = project / "data/split/tasks.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"no_detector_because": None}))
    assert find_reason(verb, "detector") is None


def test_nothing_that_takes_seconds_is_imported_before():
    graph = grimp.build_graph("loupe", include_external_packages=True)
    heavy = {"torch", "mlflow", "sklearn", "albumentations", "timm", "great_expectations"}
    assert not graph.find_upstream_modules("loupe.stages.__main__") & heavy


def test_what_a_stage_imports_says_little(project, repository):
    """Libraries set how much they say as they are imported."""
    (project / "params.yaml").write_text((repository / "params.yaml").read_text())
    (project / "data/split/tasks.json").write_text(json.dumps({"no_classifier_because": None}))
    code = """
import logging, sys
from loupe.stages import __main__, entry

def tell(stage):
    names = "mlflow", "pytorch_lightning", "lightning_fabric"
    entry.run_stage(lambda params: print(stage.__name__, *(logging.getLogger(name).level for name in names)))

__main__.run_stage = tell
sys.argv = ["stages", "train_classifier"]
__main__.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["train_classifier", *3 * [str(logging.WARNING)]]


def test_a_stage_is_run_by_its_name_as_a_process(project, repository):
    (project / "params.yaml").write_text((repository / "params.yaml").read_text())

    def run(stage):
        return subprocess.run(
            [sys.executable, "-m", "loupe.stages", stage], capture_output=True, text=True, timeout=60, check=False
        )

    for stage in OF_TASKS:
        done = run(stage)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"no {stage.partition('_')[2]}: {REASON}" in done.stdout
    done = run("train_everything")
    assert done.returncode == 2
    assert "invalid choice: 'train_everything'" in done.stderr
