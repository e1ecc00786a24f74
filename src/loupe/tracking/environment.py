"""What a run is made with: the code and what of it is not committed, the packages, the device."""

import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

CODE = ("src", "pipelines", "params.yaml", "dvc.yaml", "*dvc.lock", "*.dvc", "*/dvc.yaml")  # what results rest on
MOST_PATCH_BYTES = 4 << 20
PACKAGES = ("loupe", "torch", "torchvision", "timm", "albumentations", "numpy", "pytorch-lightning")


def describe_code() -> dict[str, str]:
    """Tags: the git commit, whether all of CODE was in it, and the sha256 of dvc.lock; what there is of them."""
    tags = {}
    commit = _ask_git("rev-parse", "HEAD")
    if commit is not None:
        changed = _ask_git("status", "--porcelain", "--", *CODE)
        tags = {"git_commit": commit.strip(), "git_tree": "changed" if changed else "clean"}
    lock = Path("dvc.lock")
    if lock.exists():
        tags["dvc_lock_sha256"] = hashlib.sha256(lock.read_bytes()).hexdigest()
    return tags


def describe_changes() -> str | None:
    """What of CODE is not committed, as a patch for `git apply`, new files with it.

    Returns:
        None where nothing is, where there is no git, or where it is more than MOST_PATCH_BYTES.
    """
    index = _ask_git("rev-parse", "--git-path", "index")
    if index is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        own_index = Path(folder) / "index"  # new files are shown by a copy, and the index stays as it is
        if Path(index.strip()).exists():
            shutil.copy(index.strip(), own_index)
        listed = _ask_git("ls-files", "--others", "--exclude-standard", "--", *CODE) or ""
        if listed:
            _ask_git("add", "--intent-to-add", "--", *listed.splitlines(), index=own_index)
        patch = _ask_git("diff", "--binary", "--no-color", "--no-ext-diff", "HEAD", "--", *CODE, index=own_index)
    return patch if patch and len(patch.encode()) <= MOST_PATCH_BYTES else None


def _ask_git(*arguments: str, index: Path | None = None) -> str | None:
    """Its answer; None where it has none, as outside of a repository."""
    environment = {**os.environ, **({} if index is None else {"GIT_INDEX_FILE": str(index)})}
    command = ["git", "-c", "core.quotePath=false", *arguments]
    answer = subprocess.run(command, capture_output=True, check=False, env=environment)
    return answer.stdout.decode(errors="replace") if answer.returncode == 0 else None


def describe_environment() -> dict[str, Any]:
    """Versions and device under flat names: what results may depend on beside code, params and data."""
    import torch  # takes seconds, which who reads the record does not need

    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "system": platform.platform(),
        "device": name_device(),
        "threads": torch.get_num_threads(),
        **({"cuda": torch.version.cuda} if torch.cuda.is_available() else {}),
    }


def name_device() -> str:
    """The GPU that is used, or the CPU where there is none."""
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    facts = Path("/proc/cpuinfo")  # of Linux alone
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def list_packages() -> str:
    """All that is installed, a line a package, as `pip freeze` has it."""
    found = {f"{package.name}=={package.version}" for package in importlib.metadata.distributions()}
    return "\n".join(sorted(found, key=str.lower)) + "\n"
