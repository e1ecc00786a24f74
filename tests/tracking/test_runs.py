import json
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import mlflow
import pytest

from loupe.errors import DataError, TrackingError
from loupe.tracking.runs import (
    ENVIRONMENT,
    PACKAGES,
    PATCH,
    connect,
    end_dead_runs,
    find_root,
    find_run,
    log_stage_times,
    open_store,
    start_run,
)

# Trains for ever, and says when it began.
ENDLESS = """
import signal, time
from loupe.tracking.runs import connect, start_run
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that a shell runs with & would have it ignored
connect("images")
with start_run("classifier", {}, {}) as run_id:
    print(run_id, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder without a store yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    return tmp_path


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A store without a run: its tables take MLflow seconds to make."""
    folder = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        open_store()
    return folder / "mlflow.db"


@pytest.fixture
def store(place, tables):
    """A real SQLite store in a folder of its own."""
    shutil.copy(tables, place)
    return place


def test_processes_that_open_a_fresh_store_at_once_all_succeed(place):
    program = "from loupe.tracking.runs import connect; connect('images')"
    processes = [subprocess.Popen([sys.executable, "-c", program], cwd=place) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]


@pytest.fixture
def endless(store):
    """A process with a run that goes on, and the run's id."""
    with subprocess.Popen([sys.executable, "-c", ENDLESS], cwd=store, stdout=subprocess.PIPE, text=True) as process:
        yield process, process.stdout.readline().strip()
        process.kill()


def git(folder, *arguments):
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(store):
    """A committed project in the folder of the store."""
    (store / "src").mkdir()
    for name, text in {"params.yaml": "seed: 0\n", "src/code.py": "one = 1\n", ".gitignore": "ml*\n"}.items():
        (store / name).write_text(text)
    git(store, "init", "-q")
    git(store, "add", "-A")
    git(store, "commit", "-qm", "start")
    return store


def load_artifact(run_id, name):
    return Path(mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=name)).read_text()


def list_artifacts(client, run_id, folder):
    return [entry.path for entry in client.list_artifacts(run_id, folder)]


def test_a_run_that_fails_ends_as_failed_with_its_reason(store):
    client = connect("images")
    with pytest.raises(ZeroDivisionError), start_run("classifier", {}, {}) as run_id:
        _ = 1 / 0
    run = client.get_run(run_id)
    assert run.info.status == "FAILED"
    assert run.data.tags["failure"] == "ZeroDivisionError: division by zero"


def test_the_reason_of_a_failure_for_people_is_its_sentence_on_one_line(store):
    client = connect("images")
    with pytest.raises(DataError), start_run("classifier", {}, {}) as run_id:
        raise DataError("all images\n  are black")
    assert client.get_run(run_id).data.tags["failure"] == "all images are black"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_interrupted_ends_as_killed(endless, number):
    process, run_id = endless
    process.send_signal(number)
    assert process.wait(60) != 0
    run = connect("images").get_run(run_id)
    assert run.info.status == "KILLED"
    assert run.data.tags["failure"] == "it was interrupted"


def test_a_run_whose_process_was_killed_is_ended_by_the_next_one_and_others_go_on(endless):
    process, run_id = endless
    client = connect("images")
    experiment_id = client.get_run(run_id).info.experiment_id
    end_dead_runs(client, experiment_id)
    assert client.get_run(run_id).info.status == "RUNNING"
    process.kill()
    process.wait()
    end_dead_runs(client, experiment_id)
    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags["failure"]) == ("KILLED", "its process was killed")


def test_sigterm_does_after_a_run_what_it_did_before(store):
    connect("images")
    before = signal.getsignal(signal.SIGTERM)
    with start_run("classifier", {}, {}):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_tells_its_packages_and_device(store):
    client = connect("images")
    with start_run("classifier", {}, {}) as run_id:
        pass
    environment = json.loads(load_artifact(run_id, ENVIRONMENT))
    assert environment["torch"] == version("torch")
    assert environment["python"] == sys.version.split()[0]
    assert environment["threads"] >= 1
    assert client.get_run(run_id).data.tags["device"] == environment["device"] != ""
    assert f"mlflow=={version('mlflow')}" in load_artifact(run_id, PACKAGES).splitlines()


def test_what_is_not_committed_can_be_applied_to_the_commit(repository):
    client = connect("images")
    (repository / "params.yaml").write_text("seed: 7\n")
    (repository / "src" / "müller.py").write_text("two = 2\n")
    (repository / "dvc.lock").write_text("stages: {}\n")
    (repository / "notes.txt").write_text("not what results rest on")
    git(repository, "add", "params.yaml")
    before = git(repository, "status", "--porcelain")
    with start_run("classifier", {}, {}) as run_id:
        pass
    assert git(repository, "status", "--porcelain") == before
    tags = client.get_run(run_id).data.tags
    assert (tags["git_commit"], tags["git_tree"]) == (git(repository, "rev-parse", "HEAD").strip(), "changed")
    copy = repository / "copy"
    git(repository, "worktree", "add", "-q", "--detach", str(copy), tags["git_commit"])
    subprocess.run(["git", "apply", "-"], cwd=copy, input=load_artifact(run_id, PATCH), text=True, check=True)
    assert (copy / "params.yaml").read_text() == "seed: 7\n"
    assert (copy / "src" / "müller.py").read_text() == "two = 2\n"
    assert (copy / "dvc.lock").read_text() == "stages: {}\n"
    assert not (copy / "notes.txt").exists()


def test_a_clean_tree_has_no_patch_and_a_folder_without_git_has_no_commit(repository, tmp_path_factory, monkeypatch):
    client = connect("images")
    (repository / "notes.txt").write_text("not what results rest on")
    with start_run("classifier", {}, {}) as run_id:
        pass
    assert client.get_run(run_id).data.tags["git_tree"] == "clean"
    assert list_artifacts(client, run_id, "code") == []
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    with start_run("classifier", {}, {}) as run_id:
        pass
    assert "git_commit" not in client.get_run(run_id).data.tags
    assert list_artifacts(client, run_id, "code") == []


def test_times_are_of_the_stages_that_ran_and_of_the_runs_own_task(store):
    client = connect("images")
    with start_run("classifier", {}, {}) as run_id:
        pass
    times = {
        "prepare": {"seconds": 1.5, "unchanged": False},
        "augment": {"seconds": 0.5, "unchanged": True},
        "evaluate_classifier": {"seconds": 3.0, "unchanged": False},
        "train_detector": {"seconds": 9.0, "unchanged": False},
    }
    log_stage_times(client, run_id, "classifier", times)
    assert client.get_run(run_id).data.metrics == {
        "stages/prepare/seconds": 1.5,
        "stages/evaluate_classifier/seconds": 3.0,
        "classifier/test/seconds": 3.0,
    }


def test_nested_params_are_logged_under_dotted_names(store):
    client = connect("images")
    with start_run("classifier", {"seed": 0, "split": {"val_fraction": 0.1}}, {"task": "classifier"}) as run_id:
        pass
    assert client.get_run(run_id).data.params == {"seed": "0", "split.val_fraction": "0.1"}


def test_a_run_of_another_store_is_named_with_the_way_out(store):
    client = connect("images")
    folder = store / "models" / "classifier"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"run_id": "0123456789abcdef0123456789abcdef"}')
    with pytest.raises(TrackingError, match="dvc repro --force train_classifier"):
        find_run(client, folder / "run.json")


def test_a_store_under_a_relative_path_is_the_projects_from_its_copies_too(place, monkeypatch):
    copy = place / ".dvc" / "tmp" / "exps" / "copy"
    copy.mkdir(parents=True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mine.db")
    monkeypatch.chdir(copy)
    open_store()
    assert (place / "mine.db").exists()
    assert not (copy / "mine.db").exists()


def test_an_experiment_of_dvc_belongs_to_the_project_it_was_copied_from(tmp_path):
    assert find_root(tmp_path / ".dvc" / "tmp" / "exps" / "one") == tmp_path
    assert find_root(tmp_path) == tmp_path


@pytest.fixture(autouse=True)
def _leave_no_active_run():
    yield
    mlflow.end_run()
