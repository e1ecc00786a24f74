"""A copy of the project to retrain in, so that nobody's working copy changes under their hands.

It is a git worktree below .dvc/tmp, where MLflow's store is still the project's, at one place that does not change, so
that DVC remembers what it hashed there. Its code is that of the last commit. Its params.yaml and what DVC writes for
git (dvc.lock, *.dvc) are the working copy's, committed or not, since `make run DATA=` writes them. Where they are still
what the last retraining began with, its results are taken: its branch may not be merged yet, and it gave new images
their split. DVC's cache and remotes are the project's.

Images that git or DVC hold are as these have them: `dvc pull` brings the newest where there is a remote. A relative
`ingest.source` that neither holds is linked to. What a stopped training goes on from, and what ingest decoded, is kept
in data/memory/retraining.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from dvc.config import Config
from dvc.exceptions import DvcException
from dvc.repo import Repo

from loupe.config import load_params
from loupe.errors import PipelineError
from loupe.stages.entry import save_json
from loupe.stages.files import DOWNLOADS, FACTS_MEMORY

PLACE = Path(".dvc/tmp/retraining")
FOLDER = PLACE / "above" / "above" / "worktree"  # so that ../images can be linked to, and ../../images
MEMORY = FACTS_MEMORY.parent
OWN_MEMORY = MEMORY / "retraining"  # not the working copy's, where a training may be running
LAST = OWN_MEMORY / "locks.json"  # of the last retraining: what it began and ended with
LOCKS = ("params.yaml", "*dvc.lock", "*.dvc")
NOBODY = ["-c", "user.name=Loupe retraining", "-c", "user.email=retraining@loupe.invalid"]


@contextmanager
def open_worktree() -> Iterator[None]:
    """Work in a fresh copy of the project in the current folder; what an interrupted run left is removed before.

    Raises:
        PipelineError: if git can't make one, or the images can't be found from there.
    """
    project = Path.cwd()
    folder = project / FOLDER
    _remove(project)
    _run_git("worktree", "add", "--quiet", "--force", "--detach", str(folder), "HEAD")
    try:
        present = read_locks()
        for name, content in _choose_locks(present).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content, encoding="utf-8")
        _share_cache(project, folder)
        _share_memory(project, folder)
        _link_source(project, folder)
        with chdir(folder):
            yield
            results = read_locks()
        save_json({"began_with": present, "ended_with": results}, project / LAST)
    finally:
        with chdir(project):
            _remove(project)


def _remove(project: Path) -> None:
    """The folder and git's note of it, where they are."""
    if (project / FOLDER).exists():
        subprocess.run(["git", "worktree", "remove", "--force", project / FOLDER], capture_output=True, check=False)
    shutil.rmtree(project / PLACE, ignore_errors=True)


def list_locks() -> list[str]:
    """params.yaml and the files that DVC writes for git, of the current folder."""
    listed = _run_git("ls-files", "--cached", "--others", "--exclude-standard", "--", *LOCKS)
    return sorted(name for name in set(listed.splitlines()) if Path(name).is_file())


def read_locks() -> dict[str, str]:
    """The content of each of these files."""
    return {name: Path(name).read_text(encoding="utf-8") for name in list_locks()}


def _choose_locks(present: dict[str, str]) -> dict[str, str]:
    last: dict[str, dict[str, str]] = json.loads(LAST.read_text(encoding="utf-8")) if LAST.exists() else {}
    return last["ended_with"] if last.get("began_with") == present else present


def _share_cache(project: Path, folder: Path) -> None:
    """DVC's cache, from which files are linked where the file system can, and remotes, whose paths may be relative."""
    with _telling_of_dvc(), Repo(str(project)) as repo:
        shared = repo.config.read()
        with Config(str(folder / ".dvc")).edit("local") as config:
            for section in ("core", "remote", "cache"):
                config[section].update(shared.get(section, {}))
            config["cache"].update(dir=repo.cache.local_cache_dir, type="reflink,hardlink,copy")


def _share_memory(project: Path, folder: Path) -> None:
    facts, own_facts = project / FACTS_MEMORY, project / OWN_MEMORY / FACTS_MEMORY.name
    own_facts.parent.mkdir(parents=True, exist_ok=True)
    if facts.exists() and not (own_facts.exists() and own_facts.stat().st_mtime >= facts.stat().st_mtime):
        shutil.copy2(facts, own_facts)
    (project / DOWNLOADS).mkdir(exist_ok=True)
    _link(folder / MEMORY, project / OWN_MEMORY)
    _link(folder / DOWNLOADS, project / DOWNLOADS)


def _link_source(project: Path, folder: Path) -> None:
    source = Path(load_params().ingest.source)
    place = Path(os.path.normpath(folder / source))
    if source.is_absolute() or place.exists() or _find_stage(source) is not None:
        return
    if not place.is_relative_to(project / PLACE):
        raise PipelineError(f"ingest.source {source} is too far above the project to retrain on: give its whole path")
    _link(place, (project / source).resolve())


def _link(place: Path, target: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target)


def find_pulled() -> str | None:
    """What `dvc pull` is asked for: the .dvc file of ingest.source; None where there is none, or no remote."""
    with _telling_of_dvc(), Repo() as repo:
        if not repo.config["remote"]:
            return None
    stage = _find_stage(Path(load_params().ingest.source))
    return stage if stage is not None and stage.endswith(".dvc") else None


def _find_stage(source: Path) -> str | None:
    """The address of the stage or .dvc file that makes the source or a folder around it; None where nothing does."""
    path = Path(os.path.normpath(Path.cwd() / source))
    with _telling_of_dvc(), Repo() as repo:
        for stage in repo.index.stages:
            if any(path.is_relative_to(out.fs_path) for out in stage.outs):
                return str(stage.addressing)
    return None


@contextmanager
def _telling_of_dvc() -> Iterator[None]:
    try:
        yield
    except DvcException as error:
        raise PipelineError(f"DVC: {error}") from error


def commit_locks(message: str) -> str:
    """Commit the files of `list_locks` on a new branch, retraining/<time in UTC>, which is ready to merge."""
    branch = f"retraining/{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    known = subprocess.run(["git", "config", "user.email"], capture_output=True, check=False).returncode == 0
    _run_git("switch", "--quiet", "--create", branch)
    _run_git("add", "--", *list_locks())
    identity = [] if known else NOBODY
    _run_git(*identity, "-c", "commit.gpgSign=false", "commit", "--quiet", "--no-verify", "--message", message)
    return branch


def _run_git(*arguments: str) -> str:
    """What git answers; hooks are for people's work.

    Raises:
        PipelineError: with git's own words.
    """
    command = ["git", "-c", f"core.hooksPath={os.devnull}", *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        said = " ".join(answer.stderr.split())
        raise PipelineError(f"retraining works in a worktree of git, and `git {arguments[0]}` fails: {said}")
    return answer.stdout
