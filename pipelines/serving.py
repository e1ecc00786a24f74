"""Prefect's server, the deployments of prefect.yaml and a worker for them on this machine, until interrupted."""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psutil
import yaml
from filelock import FileLock, Timeout
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Crashed
from prefect.workers.process import ProcessWorker

from loupe.errors import PipelineError
from loupe.stages.entry import ending_in_a_sentence

LOOPBACK = "127.0.0.1"
DEPLOYMENTS = Path("prefect.yaml")
CHANGED_DEPLOYMENTS = Path(".prefect/deployments.yaml")  # with another schedule
POOL = "loupe"
LOCK = Path(".prefect/serving.lock")
ACTIVE = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
STARTUP_SECONDS = 180
GRACE_SECONDS = 20  # in which a worker ends its flows, and these their stages


def serve(port: int, cron: str | None) -> None:
    """Start all of it, one after another, and end it with the first that ends, or when interrupted.

    Args:
        port: of Prefect's page and API, on loopback.
        cron: replaces that of every schedule in prefect.yaml.

    Raises:
        PipelineError: if the port is taken, the project is served already, or a part does not start or ends by itself.
    """
    _check_port(port)
    LOCK.parent.mkdir(exist_ok=True)
    try:
        with FileLock(LOCK, timeout=0):
            _serve_alone(port, cron)
    except Timeout as error:
        raise PipelineError("this project is served already: end that first") from error


def _serve_alone(port: int, cron: str | None) -> None:
    deployments = DEPLOYMENTS if cron is None else _change_schedule(cron)
    os.environ.update(_build_settings(port))
    with ExitStack() as running, temporary_settings({PREFECT_API_URL: os.environ["PREFECT_API_URL"]}):
        server = running.enter_context(_run("server", "start", "--host", LOOPBACK, "--port", str(port)))
        _wait_for(server, port)
        _settle()
        deploying = running.enter_context(_run("--no-prompt", "deploy", "--all", "--prefect-file", str(deployments)))
        if deploying.wait():
            raise PipelineError(f"{deployments} could not be deployed: its lines are above")
        worker = running.enter_context(_run("worker", "start", "--type", "process", "--pool", POOL))
        print(f"Prefect: http://{LOOPBACK}:{port}  (Ctrl-C ends it)", flush=True)  # noqa: T201
        while server.poll() is None and worker.poll() is None:
            time.sleep(0.5)
    raise PipelineError("Prefect's server or worker ended by itself: its last lines are above")


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        if probe.connect_ex((LOOPBACK, port)) == 0:
            raise PipelineError(f"port {port} is taken: choose another with PORT=, or end what uses it")


def _change_schedule(cron: str) -> Path:
    values = yaml.safe_load(DEPLOYMENTS.read_text(encoding="utf-8"))
    for deployment in values["deployments"]:
        for schedule in deployment.get("schedules", []):
            schedule["cron"] = cron
    CHANGED_DEPLOYMENTS.write_text(yaml.safe_dump(values), encoding="utf-8")
    return CHANGED_DEPLOYMENTS


def _build_settings(port: int) -> dict[str, str]:
    """Environment of server, worker and flows: nothing is told to anyone, and a cancellation is seen at once."""
    return {
        "PWD": str(Path.cwd()),
        "PREFECT_HOME": str(Path(".prefect").resolve()),
        "PREFECT_API_URL": f"http://{LOOPBACK}:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_API_URL": f"http://{LOOPBACK}:{port}/api",  # by itself, the page asks port 4200
        "PREFECT_SERVER_UI_V2_ENABLED": "false",  # which asks its makers for how to count, even if nothing is counted
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        # In memory, as by itself, they are lost with the server, and their limits are never free again.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_WORKER_QUERY_SECONDS": "5",
        "DVC_NO_ANALYTICS": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


@contextmanager
def _run(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command of Prefect, which ends on the way out with all that it started."""
    program = str(Path(sys.executable).with_name("prefect"))
    process = subprocess.Popen([program, *arguments], start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            psutil.wait_procs([psutil.Process(process.pid), *family], GRACE_SECONDS)
            for one in (process, *family):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        process.wait()


def _wait_for(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + STARTUP_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"http://{LOOPBACK}:{port}/api/health", timeout=5).is_success:
                return
        time.sleep(0.5)
    raise PipelineError(f"Prefect's server did not start within {STARTUP_SECONDS} s: its lines are above")


def _settle() -> None:
    """Make the worker's pool, and crash what was running when an earlier server ended: it would keep others out."""
    left = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=ACTIVE)),
        deployment_id=FlowRunFilterDeploymentId(is_null_=False),
    )
    # `prefect work-pool create` would look for a template on the web.
    template = ProcessWorker.get_default_base_job_template()
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=left):
            client.set_flow_run_state(run.id, Crashed(message="its server ended"), force=True)
        with contextlib.suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=POOL, type=ProcessWorker.type, base_job_template=template))


def main() -> None:
    """Serve until Ctrl-C; an error is one sentence."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=4200)
    parser.add_argument("--cron", help="in place of the schedule in prefect.yaml, such as '* * * * *'")
    arguments = parser.parse_args()
    for ending in (signal.SIGINT, signal.SIGTERM):  # a script's background job would ignore the former
        signal.signal(ending, signal.default_int_handler)
    with ending_in_a_sentence(), contextlib.suppress(KeyboardInterrupt):
        serve(arguments.port, arguments.cron)


if __name__ == "__main__":
    main()
