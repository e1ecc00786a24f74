"""Working on a commit in a git worktree of its own, so that nobody's working copy changes under their hands.

It stands below .dvc/tmp, where MLflow's store is still the project's. DVC's cache and remotes are shared with it, and
what git and DVC do not hold is linked to.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path

from dvc.config import Config
from dvc.exceptions import DvcException
from dvc.repo import Repo

from loupe.errors import PipelineError

WITHIN = Path("above/above/worktree")  # so that ../images can be linked to, and ../../images


@contextmanager
def open_commit(commit: str, place: Path) -> Iterator[Path]:
    """Work in a fresh worktree of a commit in the current folder, and remove it in the end.

    Args:
        place: the folder for it, relative to the project's; what a killed process left there is removed before.

    Yields:
        The project's own folder.

    Raises:
        PipelineError: if git can't make one.
    """
    project = Path.cwd()
    _remove(project, place)
    try:
        run_git("worktree", "add", "--quiet", "--force", "--detach", str(project / place / WITHIN), commit)
        with chdir(project / place / WITHIN):
            yield project
    finally:
        _remove(project, place)


def _remove(project: Path, place: Path) -> None:
    """The folder and git's note of it, where they are."""
    folder = project / place / WITHIN
    if folder.exists():
        command = ["git", "-C", str(project), "worktree", "remove", "--force", str(folder)]
        subprocess.run(command, capture_output=True, check=False)
    shutil.rmtree(project / place, ignore_errors=True)


def share_cache(project: Path) -> None:
    """Give the current folder DVC's cache, whose files are linked where they can be, and remotes of relative paths."""
    with telling_of_dvc(), Repo(str(project)) as repo:
        shared = repo.config.read()
        with Config(".dvc").edit("local") as config:
            for section in ("core", "remote", "cache"):
                config[section].update(shared.get(section, {}))
            config["cache"].update(dir=repo.cache.local_cache_dir, type="reflink,hardlink,copy")


def link_source(project: Path, place: Path, source: Path) -> None:
    """Link to a relative source of the project that neither git nor DVC holds.

    Args:
        place: of the worktree, which is the current folder.

    Raises:
        PipelineError: if the link would lie outside of `place`.
    """
    spot = Path(os.path.normpath(Path.cwd() / source))
    if source.is_absolute() or spot.exists() or find_stage(source) is not None:
        return
    if not spot.is_relative_to(project / place):
        raise PipelineError(
            f"ingest.source {source} is too far above the project to be linked to from a worktree in {place}: "
            "give its whole path"
        )
    link(spot, (project / source).resolve())


def link(spot: Path, target: Path) -> None:
    """Make a symbolic link, and the folders above it."""
    spot.parent.mkdir(parents=True, exist_ok=True)
    spot.symlink_to(target)


def find_stage(source: Path) -> str | None:
    """The address of the stage or .dvc file that makes the source or a folder around it; None where nothing does."""
    path = Path(os.path.normpath(Path.cwd() / source))
    with telling_of_dvc(), Repo() as repo:
        for stage in repo.index.stages:
            if any(path.is_relative_to(out.fs_path) for out in stage.outs):
                return str(stage.addressing)
    return None


@contextmanager
def telling_of_dvc() -> Iterator[None]:
    """Turn DVC's errors into ours."""
    try:
        yield
    except DvcException as error:
        raise PipelineError(f"DVC: {error}") from error


def run_git(*arguments: str, said: str = "") -> str:
    """What git answers to the arguments, and to what is said to it; hooks are for people's work.

    Raises:
        PipelineError: with git's own words.
    """
    command = ["git", "-c", f"core.hooksPath={os.devnull}", *arguments]
    answer = subprocess.run(command, capture_output=True, check=False, input=said.encode())
    if answer.returncode:
        reason = " ".join(answer.stderr.decode(errors="replace").split())
        raise PipelineError(f"this is done in a worktree of git, and `git {arguments[0]}` fails: {reason}")
    return answer.stdout.decode(errors="replace")
