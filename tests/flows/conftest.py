import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def copy_project(folder):
    """What git would clone, as it stands in the working tree, in a repository of its own."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in listed:
        source = ROOT / name
        if source.is_file() and not name.startswith(("tests/", "docs/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, folder / name)
    downloads = ROOT / "data" / "downloads"
    if downloads.exists():  # fetched before; otherwise the flow fetches them
        shutil.copytree(downloads, folder / "data" / "downloads")
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "start"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A clean copy of the project, with stores of its own."""
    return copy_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def environment(project):
    """That of programs which run in the copy."""
    binaries = Path(shutil.which("loupe") or "").parent
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "PREFECT_", "DVC_"))}
    return {
        **inherited,
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "DVC_NO_ANALYTICS": "1",
        "PREFECT_HOME": str(project / ".prefect"),
    }


@pytest.fixture(scope="module")
def call(project, environment):
    """Run a program of this environment in the copy."""

    def run(*command):
        return subprocess.run(
            command, cwd=project, capture_output=True, text=True, check=False, env=environment, timeout=600
        )

    return run
