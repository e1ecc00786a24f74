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
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from dvc.repo import Repo

from loupe.config import load_params
from loupe.stages.entry import save_json
from loupe.stages.files import DOWNLOADS, FACTS_MEMORY
from loupe.worktree import WITHIN, find_stage, link, link_source, open_commit, run_git, share_cache, telling_of_dvc

PLACE = Path(".dvc/tmp/retraining")
FOLDER = PLACE / WITHIN
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
    present = read_locks()
    chosen = _choose_locks(present)
    with open_commit("HEAD", PLACE) as project:
        for name, content in chosen.items():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(content, encoding="utf-8")
        share_cache(project)
        _share_memory(project)
        link_source(project, PLACE, Path(load_params().ingest.source))
        yield
        save_json({"began_with": present, "ended_with": read_locks()}, project / LAST)


def list_locks() -> list[str]:
    """params.yaml and the files that DVC writes for git, of the current folder."""
    listed = run_git("ls-files", "--cached", "--others", "--exclude-standard", "--", *LOCKS)
    return sorted(name for name in set(listed.splitlines()) if Path(name).is_file())


def read_locks() -> dict[str, str]:
    """The content of each of these files."""
    return {name: Path(name).read_text(encoding="utf-8") for name in list_locks()}


def _choose_locks(present: dict[str, str]) -> dict[str, str]:
    last: dict[str, dict[str, str]] = json.loads(LAST.read_text(encoding="utf-8")) if LAST.exists() else {}
    return last["ended_with"] if last.get("began_with") == present else present


def _share_memory(project: Path) -> None:
    facts, own_facts = project / FACTS_MEMORY, project / OWN_MEMORY / FACTS_MEMORY.name
    own_facts.parent.mkdir(parents=True, exist_ok=True)
    if facts.exists() and not (own_facts.exists() and own_facts.stat().st_mtime >= facts.stat().st_mtime):
        shutil.copy2(facts, own_facts)
    (project / DOWNLOADS).mkdir(exist_ok=True)
    link(MEMORY, project / OWN_MEMORY)
    link(DOWNLOADS, project / DOWNLOADS)


def find_pulled() -> str | None:
    """What `dvc pull` is asked for: the .dvc file of ingest.source; None where there is none, or no remote."""
    with telling_of_dvc(), Repo() as repo:
        if not repo.config["remote"]:
            return None
    stage = find_stage(Path(load_params().ingest.source))
    return stage if stage is not None and stage.endswith(".dvc") else None


def commit_locks(message: str) -> str:
    """Commit the files of `list_locks` on a new branch, retraining/<time in UTC>, which is ready to merge."""
    branch = f"retraining/{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    known = subprocess.run(["git", "config", "user.email"], capture_output=True, check=False).returncode == 0
    run_git("switch", "--quiet", "--create", branch)
    run_git("add", "--", *list_locks())
    identity = [] if known else NOBODY
    run_git(*identity, "-c", "commit.gpgSign=false", "commit", "--quiet", "--no-verify", "--message", message)
    return branch
