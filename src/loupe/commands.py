"""Running programs of this environment: alone, within their time, and never leaving a child behind."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from loupe.errors import PipelineError

LOCK = Path(".dvc/tmp/loupe.lock")
GRACE_SECONDS = 5


def run_command(command: list[str], timeout_seconds: int) -> Iterator[str]:
    """Run a program of this environment, alone among those of this project, and give its lines as they come.

    It gets a process group of its own, which ends with it, with its time, or when this process is interrupted.

    Raises:
        PipelineError: if it fails or runs out of time.
    """
    binaries = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}", "PYTHONUNBUFFERED": "1"}
    LOCK.parent.mkdir(parents=True, exist_ok=True)
    reason = ""
    with (
        FileLock(LOCK),
        subprocess.Popen(
            [str(binaries / command[0]), *command[1:]],
            env=environment,
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
                process.wait(GRACE_SECONDS if sys.exc_info()[0] is None else 0)
            except subprocess.TimeoutExpired:
                _end_group(process)


def _end_group(process: subprocess.Popen[str]) -> None:
    """Ask the group to end, then make it. An interruption comes first: DVC then puts back what it had set aside."""
    for signal_number, patience_seconds in (
        (signal.SIGINT, GRACE_SECONDS),
        (signal.SIGTERM, GRACE_SECONDS),
        (signal.SIGKILL, None),
    ):
        try:
            os.killpg(process.pid, signal_number)
            process.wait(patience_seconds)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return
