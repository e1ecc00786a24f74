import subprocess
import sys

import mlflow
import pytest

from loupe.errors import TrackingError
from loupe.tracking.runs import connect, find_root, find_run, start_run


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A real SQLite store in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    return tmp_path


def test_processes_that_open_a_fresh_store_at_once_all_succeed(store):
    program = "from loupe.tracking.runs import connect; connect('images')"
    processes = [subprocess.Popen([sys.executable, "-c", program], cwd=store) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]


def test_a_run_that_fails_ends_as_failed(store):
    client = connect("images")
    with pytest.raises(ZeroDivisionError), start_run("classifier", {}, {}) as run_id:
        _ = 1 / 0
    assert client.get_run(run_id).info.status == "FAILED"


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


def test_an_experiment_of_dvc_belongs_to_the_project_it_was_copied_from(tmp_path):
    assert find_root(tmp_path / ".dvc" / "tmp" / "exps" / "one") == tmp_path
    assert find_root(tmp_path) == tmp_path


@pytest.fixture(autouse=True)
def _leave_no_active_run():
    yield
    mlflow.end_run()
