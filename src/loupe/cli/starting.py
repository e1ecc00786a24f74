"""Commands that start other programs: the flow of the main job, and the servers of the two pages."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from loupe.cli.params import change_params, parse_change
from loupe.commands import alone_in_folder
from loupe.config import load_params
from loupe.errors import ConfigError, DataError, LoupeError
from loupe.stages.files import BUILT_IN

PARAMS = Path("params.yaml")
LOOPBACK = "127.0.0.1"
PATIENCE_SECONDS = 15  # after an interruption; a flow ends within ten
FLOW = "from loupe.stages.entry import end_with_parent; end_with_parent(); from pipelines.training import main; main()"
GRACE_SECONDS = 10  # in which servers end


def run(
    data: Annotated[str | None, typer.Option(help="A folder of images; kept as ingest.source in params.yaml.")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", "-S", help="A param, such as fetch.fraction=1.0; kept in params.yaml.")
    ] = None,
) -> None:
    """Run the main job: every stage that is not up to date, promotion, summary."""
    load_params(PARAMS)
    changes = dict(parse_change(one) for one in change or [])
    if data is not None:
        changes["ingest.source"] = _check_source(data, changes)
    if changes:
        with alone_in_folder():  # a run that is at work reads the params stage by stage
            change_params(PARAMS, changes)
    sys.stdout.flush()
    sys.exit(_follow(FLOW))


def _follow(program: str) -> int:
    """Run a program in a session of its own, and give its exit status.

    An interruption at a terminal is for all that it started: here the program alone is told, and ends what it started.
    Between two steps of a flow Prefect may lose what it is told, so that it is told again until it ends.
    """
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, env={**os.environ, **_build_settings()}, start_new_session=True)
    is_told = threading.Event()

    def tell(*_: object) -> None:
        is_told.set()
        process.send_signal(signal.SIGINT)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup keeps it out
            signal.signal(number, tell)
    while True:
        try:
            status = process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            if is_told.is_set():
                tell()
        else:
            return status if status >= 0 else 128 - status


def _check_source(data: str, changes: dict[str, Any]) -> str:
    """Refuse a folder that can't be ingested, or that DVC can't take, before anything is touched."""
    from loupe.data.sources import list_files, list_images  # pandas takes a second

    layout = changes.get("ingest.layout") or load_params().ingest.layout
    path = Path(data).expanduser()
    if path == BUILT_IN and not path.exists():
        return path.as_posix()  # the stage fetch makes it
    list_images(path, layout)
    lost = [name for name in list_files(path)[0] if not (path / name).is_file()]
    if lost:
        raise DataError(f"{path / lost[0]} is a link to nothing, no regular file, or named in no Unicode: remove it")
    return path.as_posix()


def _build_settings() -> dict[str, str]:
    """Environment of what is run from here: nothing is told to anyone, and log lines are short."""
    return {
        "DVC_NO_ANALYTICS": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_FORMATTERS_STANDARD_FLOW_RUN_FMT": "%(asctime)s  %(message)s",
        "PREFECT_LOGGING_FORMATTERS_STANDARD_TASK_RUN_FMT": "%(asctime)s  %(task_name)s  %(message)s",
    }


def ui(
    mlflow_port: Annotated[int, typer.Option(help="Port of MLflow's page.")] = 5000,
    prefect_port: Annotated[int, typer.Option(help="Port of Prefect's page.")] = 4200,
) -> None:
    """Open MLflow's and Prefect's pages over what was run, on loopback, until interrupted."""
    if mlflow_port == prefect_port:
        raise ConfigError(f"--mlflow-port and --prefect-port must differ; both are {mlflow_port}")
    store = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    commands = {
        mlflow_port: ["mlflow", "server", "--backend-store-uri", store, "--workers", "1"],
        prefect_port: ["prefect", "server", "start"],
    }
    for port in commands:
        _check_port(port)
    settings = {
        **_build_settings(),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight processes that judge chats
        "PREFECT_SERVER_UI_API_URL": f"http://{LOOPBACK}:{prefect_port}/api",  # by itself, the page asks port 4200
        "PREFECT_SERVER_UI_V2_ENABLED": "false",  # which asks its makers for how to count, even if nothing is counted
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    }
    typer.echo(
        f"MLflow: http://{LOOPBACK}:{mlflow_port}  Prefect: http://{LOOPBACK}:{prefect_port}  (Ctrl-C ends both)"
    )
    _serve([[*command, "--host", LOOPBACK, "--port", str(port)] for port, command in commands.items()], settings)


def _serve(commands: list[list[str]], settings: dict[str, str]) -> None:
    """Until an interruption, or until one of the servers ends, and then end them all."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the last, where the terminal is closed
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup keeps it out
            signal.signal(number, signal.default_int_handler)
    binaries, servers = Path(sys.executable).parent, []
    try:
        for program, *arguments in commands:
            command = [str(binaries / program), *arguments]
            servers.append(subprocess.Popen(command, env={**os.environ, **settings}, start_new_session=True))
        while all(server.poll() is None for server in servers):
            time.sleep(0.5)
    except KeyboardInterrupt:
        return
    finally:
        _end(servers)
    raise LoupeError("one of the two servers ended by itself; its last lines are above")


def _end(servers: list[subprocess.Popen[bytes]]) -> None:
    """Ask all to end, with what they started, and then make those that don't: an open page may hold them."""
    for server in servers:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    for server in servers:
        with suppress(subprocess.TimeoutExpired):
            server.wait(max(0, deadline - time.monotonic()))
        with suppress(ProcessLookupError):  # those that its leader left behind, too
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        if probe.connect_ex((LOOPBACK, port)) == 0:
            raise LoupeError(f"port {port} is taken: choose another with --mlflow-port or --prefect-port")
