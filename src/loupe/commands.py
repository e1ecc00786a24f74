"""Running programs of this environment: alone, within their time, and never leaving a child behind."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from loupe.errors import PipelineError

LOCK, RUN_LOCK = Path(".dvc/tmp/loupe.lock"), Path(".dvc/tmp/loupe-run.lock")
# What is freed is used again, in huge pages, where Linux would take it back and clear each page anew: a training step
# on two cores takes 0.36 s in place of 0.42. In bytes; the first is the most that glibc allows.
MALLOC = "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=17179869184:glibc.malloc.hugetlb=1"
GRACE_SECONDS = {signal.SIGINT: 4, signal.SIGTERM: 3, signal.SIGKILL: None}  # less than 10 for all


def run_command(command: list[str], timeout_seconds: int, *, alone: bool = True) -> Iterator[str]:
    """Run a program of this environment on the code of the current folder, and give its lines as they come.

    It gets a process group of its own, which ends with it, with its time, or with this process, however that ends.

    Args:
        command: the program's name and its arguments.
        timeout_seconds: after these it is ended.
        alone: wait until no other such program runs in this folder.

    Raises:
        PipelineError: if it fails or runs out of time.
    """
    LOCK.parent.mkdir(parents=True, exist_ok=True)
    reason = ""
    with (
        FileLock(LOCK) if alone else nullcontext(),
        subprocess.Popen(
            [sys.executable, "-P", __file__, str(os.getpid()), *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process,
        _ending_group(process, timeout_seconds) as ran_out,
    ):
        assert process.stdout is not None  # it is a pipe
        for line in process.stdout:
            if line.startswith(("error: ", "ERROR: ")):
                reason = reason or line.partition(" ")[2].strip()
            if line.strip():
                yield line.rstrip()
    if ran_out():
        raise PipelineError(f"`{' '.join(command)}` ran longer than pipeline.stage_timeout_seconds ({timeout_seconds})")
    if process.returncode:
        raise PipelineError(reason or f"`{' '.join(command)}` ended with {process.returncode}; its log says why")


@contextmanager
def alone_in_folder() -> Iterator[None]:
    """Wait until no other run of all stages is at work in the current folder, and keep others waiting."""
    RUN_LOCK.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(RUN_LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        sys.stderr.write("another run is at work in this folder: waiting for its end\n")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _ending_group(process: subprocess.Popen[str], timeout_seconds: int) -> Iterator[Callable[[], bool]]:
    """Ends the process's whole group on the way out, or when its time is up; gives a question whether that was so."""
    ran_out = threading.Event()

    def end() -> None:
        ran_out.set()
        _end_group(process)

    timer = threading.Timer(timeout_seconds, end)
    timer.start()
    try:
        yield ran_out.is_set
    finally:
        timer.cancel()
        if process.poll() is None:
            try:
                process.wait(GRACE_SECONDS[signal.SIGINT] if sys.exc_info()[0] is None else 0)
            except subprocess.TimeoutExpired:
                _end_group(process)


def _end_group(process: subprocess.Popen[str]) -> None:
    """Ask the group to end, then make it. An interruption comes first: DVC then puts back what it had set aside."""
    for number, patience_seconds in GRACE_SECONDS.items():
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(patience_seconds)
            break
    with suppress(ProcessLookupError):  # those that its leader left behind
        os.killpg(process.pid, signal.SIGKILL)


def main() -> None:
    """Run a program beside which `run_command` can't stand guard any more when it is killed itself.

    The arguments are the id of the process that asked, and the program with its own. Its signals are left to the
    program: by a handler, since what is ignored would be ignored by children too.
    """
    parent, program, *arguments = sys.argv[1:]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    binaries = Path(sys.executable).parent
    process = subprocess.Popen([str(binaries / program), *arguments], env=_build_environment(binaries))
    while process.poll() is None:
        if os.getppid() != int(parent):
            os.killpg(0, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(1)
    sys.exit(process.returncode if process.returncode >= 0 else 128 - process.returncode)


def _build_environment(binaries: Path) -> dict[str, str]:
    """Programs are those of this environment; what they import of Loupe is the current folder's, as in a worktree."""
    paths = {"PATH": str(binaries), "PYTHONPATH": str(Path("src").resolve())}
    joined = {name: os.pathsep.join(filter(None, (path, os.environ.get(name)))) for name, path in paths.items()}
    return {"GLIBC_TUNABLES": MALLOC, **os.environ, **joined, "PYTHONUNBUFFERED": "1"}


if __name__ == "__main__":
    main()
