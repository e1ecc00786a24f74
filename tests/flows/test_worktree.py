"""The copy that retraining works in: what it holds, what it shares, and that nothing of it shows in the project."""

import subprocess
from pathlib import Path

import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML

from loupe.errors import PipelineError
from pipelines.worktree import FOLDER, OWN_MEMORY, PLACE, commit_locks, find_pulled, open_worktree, read_locks

ROOT = Path(__file__).parent.parent.parent


def git(*arguments):
    command = ["git", "-c", "user.name=test", "-c", "user.email=test@example.invalid", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def change_source(source):
    yaml = YAML()
    values = yaml.load(Path("params.yaml"))
    values["ingest"]["source"] = source
    yaml.dump(values, Path("params.yaml"))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with one stage, in the middle of somebody's work."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, "/dev/null")
    git("init", "--quiet")
    Repo.init().close()
    Path("params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    Path("code.py").write_text("committed\n")
    Path("dvc.yaml").write_text("stages:\n  copy:\n    cmd: cp code.py out\n    deps: [code.py]\n    outs: [out]\n")
    Path(".gitignore").write_text("/out\n/data/memory\n/data/downloads\n")
    git("add", "--all")
    git("commit", "--quiet", "--message", "start")
    change_source(str(tmp_path / "images"))
    with Repo() as repo:
        repo.reproduce()
    return folder


def describe():
    return git("status", "--porcelain"), git("log", "--all", "--format=%H %D"), Path("params.yaml").read_text()


def test_the_copy_has_committed_code_with_the_params_and_results_of_the_working_copy(project):
    Path("code.py").write_text("half done\n")
    params, lock = Path("params.yaml").read_text(), Path("dvc.lock").read_text()
    with open_worktree():
        assert Path("code.py").read_text() == "committed\n"
        assert (Path("params.yaml").read_text(), Path("dvc.lock").read_text()) == (params, lock)
        with Repo() as repo:
            repo.checkout()
            assert repo.status() == {}
        assert Path("out").read_text() == "committed\n"


def test_nothing_of_it_shows_in_the_project_afterwards(project):
    before = describe()
    with open_worktree():
        Path("out").write_text("of the copy")
    assert describe() == before
    assert not PLACE.exists()
    assert git("worktree", "list").count("\n") == 0
    assert Path("out").read_text() == "committed\n"


def test_what_a_killed_run_left_is_replaced(project):
    git("worktree", "add", "--quiet", "--detach", str(FOLDER))
    (FOLDER / "rubbish").touch()
    with open_worktree():
        assert Path.cwd() == project / FOLDER
        assert not Path("rubbish").exists()


def test_memory_outlives_the_copy_and_is_not_the_working_copys(project):
    Path("data/memory/training").mkdir(parents=True)
    Path("data/memory/facts.parquet").write_text("facts")
    with open_worktree():
        assert Path("data/memory/facts.parquet").read_text() == "facts"
        assert not Path("data/memory/training").exists()
        Path("data/memory/training").mkdir()
        Path("data/memory/training/epoch").write_text("7")
    assert (OWN_MEMORY / "training/epoch").read_text() == "7"
    with open_worktree():
        assert Path("data/memory/training/epoch").read_text() == "7"


@pytest.mark.parametrize("source", ["images", "../images", "../../images", "deep/in/images"])
def test_a_relative_source_is_the_projects(project, source):
    folder = project / source
    folder.mkdir(parents=True)
    (folder / "new.png").touch()
    change_source(source)
    with open_worktree():
        assert [path.name for path in Path(source).iterdir()] == ["new.png"]
        assert Path(source).resolve() == folder.resolve()
    assert (folder / "new.png").exists()


def test_a_source_too_far_above_is_refused_with_the_way_out(project):
    change_source("../../../../images")
    with pytest.raises(PipelineError, match="give its whole path"), open_worktree():
        pass
    assert not PLACE.exists()


def test_images_that_dvc_holds_come_from_its_remote_by_a_relative_path(project, tmp_path):
    Path("images").mkdir()
    Path("images/one.png").write_text("one")
    Path(".dvc/config").write_text("[core]\n    remote = store\n['remote \"store\"']\n    url = ../../store\n")
    change_source("images")
    with Repo() as repo:
        repo.add("images")
        repo.push()
    git("add", "--all")
    git("commit", "--quiet", "--message", "images")
    Path(".dvc/cache").rename(tmp_path / "lost")
    with open_worktree():
        assert not Path("images").exists()
        assert find_pulled() == "images.dvc"
        with Repo() as repo:
            repo.pull("images.dvc")
        assert Path("images/one.png").read_text() == "one"
        assert not Path("images").is_symlink()


def test_without_a_remote_nothing_is_pulled(project):
    with open_worktree():
        assert find_pulled() is None


def test_results_are_committed_on_a_branch_of_their_own_by_nobody_in_person(project):
    head = git("rev-parse", "HEAD")
    with open_worktree():
        Path("dvc.lock").write_text("schema: '2.0'\n")
        Path("code.py").write_text("not to be committed\n")
        branch = commit_locks("Retrained")
    assert git("rev-parse", "HEAD") == head
    assert git("show", "--name-only", "--format=%an", branch).split() == [
        "Loupe",
        "retraining",
        "dvc.lock",
        "params.yaml",
    ]
    assert git("show", f"{branch}:dvc.lock") == "schema: '2.0'"
    assert branch.startswith("retraining/")


def test_the_next_run_goes_on_from_results_that_nobody_merged_until_the_working_copy_moves_on(project):
    with open_worktree():
        Path("dvc.lock").write_text("schema: '2.0'\n")
    with open_worktree():
        assert Path("dvc.lock").read_text() == "schema: '2.0'\n"
    change_source("/elsewhere")
    present = read_locks()
    with open_worktree():
        assert read_locks() == present


def test_a_run_that_fails_leaves_no_results_to_go_on_from(project):
    def fail():
        with open_worktree():
            Path("dvc.lock").write_text("half done\n")
            raise PipelineError

    with pytest.raises(PipelineError):
        fail()
    with open_worktree():
        assert Path("dvc.lock").read_text() != "half done\n"


def test_a_folder_without_git_is_refused_with_gits_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(PipelineError, match="worktree of git, and `git ls-files` fails: fatal: not a git repo"),
        open_worktree(),
    ):
        pass
