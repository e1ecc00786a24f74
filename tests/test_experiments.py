"""DVC experiments on a project whose stages take no time: real DVC, real git, real files."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from loupe.config import load_params
from loupe.errors import PipelineError
from loupe.experiments import Experiment, run_experiments

GRAPH = """
stages:
  train_classifier:
    cmd: python train.py
    params: [ingest.source, seed, train_classifier]
    deps: [train.py]
    outs: [models/classifier]
  evaluate_classifier:
    cmd: python evaluate.py
    deps: [evaluate.py, models/classifier]
    metrics: [reports/metrics/classifier.json]
"""
# Trains as many epochs as there are images, fails with the seed 13, has nothing to train with 14, and hangs with 15.
TRAIN = """
import json, pathlib, sys, time, uuid, yaml

params = yaml.safe_load(open("params.yaml"))
folder, seed = pathlib.Path("models/classifier"), params["seed"]
folder.mkdir(parents=True)
if seed == 13:
    sys.exit("error: 13 is no seed")
if seed == 14:
    (folder / "skipped.json").write_text(json.dumps({"reason": "there is one class (good)"}))
    sys.exit()
if seed == 15:
    print("started", flush=True)
    time.sleep(600)
num_images = len(list(pathlib.Path(params["ingest"]["source"]).iterdir()))
rows = [f"{epoch},{seed}" for epoch in range(num_images)]
(folder / "history.csv").write_text("\\n".join(["epoch,val/loss", *rows]))
(folder / "run.json").write_text(json.dumps({"run_id": uuid.uuid4().hex, "model_uri": "models:/m"}))
"""
EVALUATE = """
import json, pathlib, yaml

params, file = yaml.safe_load(open("params.yaml")), pathlib.Path("reports/metrics/classifier.json")
file.parent.mkdir(parents=True, exist_ok=True)
file.write_text(json.dumps({"classifier/test/" + params["train_classifier"]["recipe"]: params["seed"]}))
"""
LISTING = {"name": "pets", "source": "pets", "layout": "class_folders", "num_images": 3, "num_quarantined": 0}
SCRATCH = Experiment("scratch", {"train_classifier.recipe": "scratch", "seed": 1})
FEATURES = Experiment("features", {"train_classifier.recipe": "features", "seed": 2})


def git(folder, *arguments):
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory, repository):
    """A committed project; its images lie outside, under a relative path with all that a shell or YAML could mind."""
    images = tmp_path_factory.mktemp("images") / 'it\'s 1, "2" & {3}=[4]'
    images.mkdir()
    for number in range(3):
        (images / f"{number}.png").touch()
    folder = tmp_path_factory.mktemp("project")
    (folder / "data/ingest").mkdir(parents=True)
    files = {"dvc.yaml": GRAPH, "train.py": TRAIN, "evaluate.py": EVALUATE, "data/ingest/listing.json": LISTING}
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    source = json.dumps(os.path.relpath(images, folder))
    params = (repository / "params.yaml").read_text().replace("data/fashion_mnist/images ", f"{source} ")
    (folder / "params.yaml").write_text(params)
    git(folder, "init", "-q")
    git(folder, "config", "user.name", "test")
    git(folder, "config", "user.email", "test@example.invalid")
    subprocess.run([shutil.which("dvc"), "init", "-q"], cwd=folder, check=True)
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "start")
    return folder


@pytest.fixture
def project(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


@pytest.fixture
def run(project):
    """Runs experiments; gives their results and the lines of the log."""

    def run(*experiments):
        lines = []
        return run_experiments(experiments, "classifier", load_params(), lines.append), lines

    return run


def take_stock(folder):
    """What git and the eye see of a working copy."""
    files = (path for path in folder.rglob("*") if path.is_file() and not {".git", ".dvc"} & set(path.parts))
    contents = {path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return contents, git(folder, "status", "--porcelain"), git(folder, "branch", "--show-current"), git(folder, "diff")


def list_copies(folder):
    return [path.name for path in (folder / ".dvc/tmp/exps/standalone").glob("tmp*")]


def test_each_result_is_of_its_own_params(run):
    (scratch, features), lines = run(SCRATCH, FEATURES)
    assert scratch.figures == {"classifier/test/scratch": 1}
    assert features.figures == {"classifier/test/features": 2}
    assert scratch.history.to_dict("list") == {"epoch": [0, 1, 2], "val/loss": [1, 1, 1]}
    assert scratch.data_set.name == "pets"
    assert scratch.run_id != features.run_id
    assert lines[0] == "experiment 1 of 2: scratch"
    assert "> python train.py" in lines


def test_what_is_known_is_not_computed_again(run):
    (first,), _ = run(SCRATCH)
    (second,), lines = run(SCRATCH)
    assert second.run_id == first.run_id
    assert [line for line in lines if "Running stage" in line] == []


def test_an_experiment_of_the_same_name_is_replaced(run):
    run(SCRATCH)
    (other,), _ = run(Experiment("scratch", {**SCRATCH.changes, "seed": 5}))
    assert other.figures == {"classifier/test/scratch": 5}


def test_the_working_copy_stays_as_it_is(run, project):
    params, note = project / "params.yaml", project / "note.txt"
    before = params.read_text()
    try:
        params.write_text(before.replace("seed: 0", "seed: 7"))
        note.write_text("mine")
        (project / "evaluate.py").write_text(f"{EVALUATE}# staged")
        git(project, "add", "evaluate.py")
        stock = take_stock(project)
        (result,), _ = run(Experiment("unchanged", {}))
        assert take_stock(project) == stock
        assert list_copies(project) == []
        assert result.figures == {"classifier/test/fine_tuned": 7}
    finally:
        note.unlink()
        git(project, "reset", "-q", "--hard")


def test_a_failure_is_the_stages_sentence_and_ends_the_rest(run, project):
    lines = []
    experiments = [Experiment("unlucky", {"seed": 13}), FEATURES]
    with pytest.raises(PipelineError, match=r"^unlucky: 13 is no seed$"):
        run_experiments(experiments, "classifier", load_params(), lines.append)
    assert "experiment 2 of 2: features" not in lines
    assert list_copies(project) == []


def test_data_that_trains_no_such_model_says_why(run):
    with pytest.raises(PipelineError, match=r"^one: this data trains no classifier: there is one class \(good\)$"):
        run(Experiment("one", {"seed": 14}))


def test_an_interruption_leaves_no_copy_no_process_and_no_change(project):
    stock = take_stock(project)
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from loupe.config import load_params\n"
        "from loupe.experiments import Experiment, run_experiments\n"
        "tell = lambda line: print(line, flush=True)\n"
        "run_experiments([Experiment('endless', {'seed': 15})], 'classifier', load_params(), tell)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        while process.stdout.readline() != "started\n":
            assert process.poll() is None
        assert len(list_copies(project)) == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(30) != 0
    deadline = time.monotonic() + 10
    while list_copies(project) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert list_copies(project) == []
    assert take_stock(project) == stock


def test_results_that_the_cache_lacks_are_told_before_anything_runs(run, project, tmp_path):
    lock, cache = project / "dvc.lock", project / ".dvc/cache/files"
    subprocess.run([shutil.which("dvc"), "repro", "-q"], check=True, env=os.environ)
    try:
        cache.rename(tmp_path / "files")
        with pytest.raises(PipelineError, match=r"^dvc.lock names models/classifier, which DVC's cache does not hold"):
            run(SCRATCH)
    finally:
        (tmp_path / "files").rename(cache)
        lock.unlink()
        shutil.rmtree(project / "models")
        shutil.rmtree(project / "reports")


def test_a_folder_without_dvc_or_without_a_commit_is_one_sentence(project, tmp_path, monkeypatch):
    params = load_params()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PipelineError, match="you are not inside of a DVC repository"):
        run_experiments([SCRATCH], "classifier", params, print)
    git(tmp_path, "init", "-q")
    subprocess.run([shutil.which("dvc"), "init", "-q"], check=True)
    with pytest.raises(PipelineError, match="Add a commit"):
        run_experiments([SCRATCH], "classifier", params, print)
