"""How tests serve a project's deployments, and ask what became of them."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

PATIENCE_SECONDS = 1800


@contextlib.contextmanager
def serve(folder, *arguments):
    """Gives the process and the address of the API, when it is served."""
    port = find_free_port()
    command = [sys.executable, "-m", "pipelines.serving", "--port", str(port), *arguments]
    with (
        (folder / "served.log").open("w") as log,
        subprocess.Popen(command, cwd=folder, env=build_environment(), stdout=log, stderr=log) as process,
    ):
        try:
            wait_for(lambda: "Ctrl-C ends it" in (folder / "served.log").read_text() or process.poll() is not None)
            yield process, f"http://127.0.0.1:{port}/api"
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(PATIENCE_SECONDS)


@contextlib.contextmanager
def connect(api):
    with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as client:
        yield client


def wait_for(question):
    """What it answers as soon as that is something."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if answer := question():
            return answer
        time.sleep(0.2)
    raise TimeoutError(question)


def find_free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def build_environment():
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "PREFECT_", "DVC_"))}
    return {**inherited, "DVC_NO_ANALYTICS": "1"}
