"""From a folder of images to a promoted classifier and anomaly detector."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from ruamel.yaml import YAML

from loupe.config import load_params, parse_params
from loupe.errors import ConfigError, LoupeError
from loupe.stages.entry import TRACEBACK_VARIABLE, run_stage

if TYPE_CHECKING:
    from rich.table import Table

    from loupe.models.explain import Explanation, Layer

PARAMS = Path("params.yaml")
LOOPBACK = "127.0.0.1"
GRACE_SECONDS = 10  # in which servers end

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
bench = typer.Typer(no_args_is_help=True, help="Compare what there is to choose from on one data set.")
app.add_typer(bench, name="bench")


@app.command()
def run(
    data: Annotated[str | None, typer.Option(help="A folder of images; kept as ingest.source in params.yaml.")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", "-S", help="A param, such as fetch.fraction=1.0; kept in params.yaml.")
    ] = None,
) -> None:
    """Run the main job: every stage that is not up to date, promotion, summary."""
    changes = dict(_parse_change(one) for one in change or [])
    if data is not None:
        changes["ingest.source"] = _check_source(data, changes)
    change_params(PARAMS, changes)
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "pipelines.training"], {**os.environ, **_build_settings()})


def _parse_change(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"--set takes key=value, such as fetch.fraction=1.0; got {text!r}")
    return key, YAML(typ="safe").load(value)


def _check_source(data: str, changes: dict[str, Any]) -> str:
    """Refuse a folder that can't be ingested before anything is touched."""
    from loupe.data.sources import list_images  # pandas takes a second

    layout = changes.get("ingest.layout") or load_params(PARAMS).ingest.layout
    path = Path(data).expanduser()
    list_images(path, layout)
    return path.as_posix()


def change_params(path: Path, changes: dict[str, Any]) -> None:
    """Write params.yaml anew, comments and all, if it is as it should be after the changes.

    Args:
        changes: values by dotted key.

    Raises:
        ConfigError: if it is not; the file is then left as it was.
    """
    load_params(path)
    if not changes:
        return
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 200
    values = yaml.load(path)
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = values
        for parent in parents:
            section = section.get(parent)
            if not isinstance(section, dict):
                raise ConfigError(f"{path} has no section {parent!r}, which {key} would be in")
        section[last] = value
    text = io.StringIO()
    yaml.dump(values, text)
    parse_params(YAML(typ="safe").load(text.getvalue()), str(path))
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text.getvalue(), encoding="utf-8")
    unfinished.replace(path)
    typer.echo(f"{path} now has {', '.join(f'{key}: {value}' for key, value in changes.items())}")


def _build_settings() -> dict[str, str]:
    """Environment of what is run from here: nothing is told to anyone, and log lines are short."""
    return {
        "DVC_NO_ANALYTICS": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_FORMATTERS_STANDARD_FLOW_RUN_FMT": "%(asctime)s  %(message)s",
        "PREFECT_LOGGING_FORMATTERS_STANDARD_TASK_RUN_FMT": "%(asctime)s  %(task_name)s  %(message)s",
    }


@app.command()
def promote(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be decided, and change nothing.")] = False,
    override: Annotated[
        str | None, typer.Option(metavar="TASK", help="Make the trained classifier or detector champion regardless.")
    ] = None,
    reason: Annotated[str, typer.Option(help="Why it is overridden; kept in the audit.")] = "",
    stage_times: Annotated[
        Path | None, typer.Option(help="Seconds of each stage, as the flow writes them; kept on the runs.")
    ] = None,
) -> None:
    """Register what was trained, and decide who is champion."""
    from loupe import promotion  # torch and mlflow take seconds
    from loupe.model_card import attach_model_cards
    from loupe.stages.recording import record_stage_times

    if override is not None and dry_run:
        raise ConfigError("--override decides nothing that --dry-run could show: use one of them")
    if override is None and reason:
        raise ConfigError("--reason is for --override: a decision by the rules has reasons of its own")
    if override is not None:
        task = override
        run_stage(lambda params: promotion.override(task, reason))
    else:
        run_stage(lambda params: promotion.promote(params, dry_run))
    if not dry_run:
        run_stage(lambda params: attach_model_cards())
    if stage_times is not None:
        times = json.loads(stage_times.read_text(encoding="utf-8"))
        run_stage(lambda params: record_stage_times(times))


@app.command()
def history(
    name: Annotated[
        str | None, typer.Argument(help="classifier, detector, or a model of MLflow's registry; both, if left out.")
    ] = None,
) -> None:
    """Show who was champion, since when, by whose decision and why."""
    from loupe.history import show_history  # mlflow takes seconds

    run_stage(lambda params: show_history(name))


@app.command()
def rollback(
    reason: Annotated[str, typer.Option(help="Why; kept in the audit.")],
    task: Annotated[str | None, typer.Argument(help="classifier or detector; may be left out if only one is.")] = None,
) -> None:
    """Put the previous champion back; a second time, the one before it."""
    from loupe.history import roll_back  # mlflow takes seconds

    run_stage(lambda params: roll_back(task, reason))


@app.command()
def forget(
    name: Annotated[str, typer.Argument(help="classifier, detector, or a model of MLflow's registry.")],
    version: Annotated[str, typer.Argument(help="Its number.")],
    reason: Annotated[str, typer.Option(help="Why; kept in the audit.")],
) -> None:
    """Delete a version that is neither champion, previous champion nor challenger."""
    from loupe.history import forget as forget_version  # mlflow takes seconds

    run_stage(lambda params: forget_version(name, version, reason))


@app.command()
def ladder() -> None:
    """Train and test by each recipe, from scratch to fine-tuned, and compare them; the working copy stays as it is."""
    from loupe.ladder import climb_ladder  # mlflow and DVC take seconds

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    climb_ladder(load_params(PARAMS))


@bench.command()
def detectors(
    data: Annotated[
        Path | None, typer.Argument(help="A folder of images, instead of ingest.source of params.yaml.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Of division and fit, such as 0,1,2.")] = "0,1,2",
    models: Annotated[str, typer.Option(help="Some of the detectors, such as padim,vae; all, if left out.")] = "",
) -> None:
    """Fit and test every detector over seeds, and compare them; the working copy stays as it is."""
    from loupe.detector_bench import NAMES, bench_detectors  # mlflow and DVC take seconds

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    names = _parse_list(models) or NAMES
    numbers = [_parse_seed(seed) for seed in _parse_list(seeds)]
    bench_detectors(load_params(PARAMS), None if data is None else data.expanduser(), names, numbers)


def _parse_list(text: str) -> list[str]:
    """What commas or spaces divide."""
    return re.findall(r"[^,\s]+", text)


def _parse_seed(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f"--seeds takes whole numbers from 0 on, such as 0,1,2; got {text!r}")
    return int(text)


@app.command()
def runs(
    run_ids: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN]...", help="Compare these: ids, or their beginnings.")
    ] = None,
    experiment: Annotated[str | None, typer.Option(help="Of which data set; of the present one, if left out.")] = None,
    task: Annotated[str | None, typer.Option(help="Only classifier or detector.")] = None,
    last: Annotated[int, typer.Option(min=1, help="How many.")] = 20,
) -> None:
    """List trainings with their figures, the newest first, or compare some: what differs, figures side by side."""
    from loupe.runs import compare_runs, show_runs  # mlflow takes seconds

    if run_ids and (experiment or task):
        raise ConfigError("--experiment and --task are for the list: runs to compare are named by their ids alone")
    if run_ids:
        compare_runs(run_ids)
    else:
        show_runs(experiment, task, last)


@app.command()
def reproduce(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="Its id, or the beginning of it.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say how.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Also with other data or params, or without changes that nobody recorded.")
    ] = False,
) -> None:
    """Make a training again from its record, in a copy of the project, and compare; exits with 1 if figures differ."""
    from loupe.reproduction import reproduce as make_again  # mlflow and DVC take seconds

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if not make_again(run_id, force, dry_run):
        raise typer.Exit(1)


@app.command()
def reconstruct(
    source: Annotated[
        Path | None, typer.Argument(help="An image or a folder of images; if left out, some of the test images.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The picture, a PNG file.")] = Path("reports/reconstructions.png"),
    latents: Annotated[
        Path | None, typer.Option(help="Write the latent vectors of all these images as well, as a Parquet file.")
    ] = None,
) -> None:
    """Show what the trained autoencoder makes of images: originals, reconstructions, errors."""
    from loupe.reconstruction import show_reconstructions  # torch takes seconds

    for path in show_reconstructions(source, out, latents):
        typer.echo(f"written: {path}")


@app.command()
def score(
    source: Annotated[Path, typer.Argument(help="An image, a folder of images, or a table with the column `path`.")],
    model: Annotated[
        str, typer.Option(help="An alias of this data's models, or one model: <name>@<alias> or <name>/<version>.")
    ] = "champion",
    out: Annotated[Path, typer.Option(help="The table: .parquet or .csv.")] = Path("scores/scores.parquet"),
    threshold: Annotated[float | None, typer.Option(help="Raw anomaly score above which an image is flagged.")] = None,
    false_alarm_rate: Annotated[
        float | None, typer.Option(min=0, max=1, help="Set the threshold for this rate, by the calibration images.")
    ] = None,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Keep each image's embedding as well.")] = False,
    maps: Annotated[Path | None, typer.Option(help="A folder for heat maps, one picture an image.")] = None,
) -> None:
    """Score images by registered models: one row an image, written in parts that a stopped run goes on from."""
    from loupe.scoring import Request, score_and_tell  # torch and mlflow take seconds

    run_stage(
        lambda params: score_and_tell(
            Request(source, model, out, threshold, false_alarm_rate, embeddings=embeddings, maps=maps)
        )
    )


@app.command()
def drift(
    source: Annotated[
        Path, typer.Argument(help="A table that `loupe score --embeddings` wrote, or a folder of images to score.")
    ],
    model: Annotated[
        str, typer.Option(help="An alias of this data's models, or one model: <name>@<alias> or <name>/<version>.")
    ] = "champion",
    images: Annotated[
        Path | None, typer.Option(help="Where the table's paths start, for pictures; the table's folder, if left out.")
    ] = None,
) -> None:
    """Compare recent images with those a model is known by: whether they drifted, how far, and which moved most."""
    from loupe.drift import check_drift  # torch and mlflow take seconds

    run_stage(lambda params: check_drift(params, source, model, images))


@app.command()
def model(
    name: Annotated[str, typer.Argument(help="A network that timm knows, or the course's own, such as lenet5.")],
    size: Annotated[
        str | None, typer.Option(help="Side of the images, such as 224, or height x width, such as 128x256.")
    ] = None,
    channels: Annotated[int | None, typer.Option(min=1, help="Channels of the images.")] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="Number of classes.")] = None,
) -> None:
    """Show a network layer by layer: shapes, parameters, receptive fields. What is not given is the network's own."""
    sides = None if size is None else _parse_size(size)
    from rich.console import Console

    from loupe.models.explain import explain_network  # torch and timm take seconds

    explanation = explain_network(name, sides, channels, classes)
    console = Console(highlight=False)
    console.print(_build_layer_table(explanation))
    console.print(
        f"\n{explanation.num_parameters:,} parameters ({explanation.num_bytes / 1e6:,.2f} MB), "
        f"{explanation.num_multiply_adds:,} multiply-adds an image\n"
        "Receptive fields are sides in pixels, and may reach into the padding.\n"
        "Layers without parameters that keep the shape (ReLU, dropout) are left out."
    )


def _parse_size(text: str) -> tuple[int, int]:
    """Height and width in pixels."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() and int(side) > 0 for side in sides):
        raise ConfigError(f"--size takes a side such as 224, or height x width such as 128x256; got {text!r}")
    return int(sides[0]), int(sides[-1])


def _build_layer_table(explanation: "Explanation") -> "Table":
    from rich import box
    from rich.table import Table

    title = f"{explanation.name} on {_join_sides(explanation.input_shape)}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer", overflow="fold")
    table.add_column("kind", overflow="fold")
    for heading in ("output", "parameters", "receptive\nfield"):
        table.add_column(heading, justify="right")
    for layer in explanation.layers:
        table.add_row(
            layer.name,
            layer.kind,
            _join_sides(layer.output_shape),
            f"{layer.num_parameters:,}" if layer.num_parameters else "",
            _write_field(layer),
        )
    return table


def _write_field(layer: "Layer") -> str:
    """A square is written as its side."""
    if layer.receptive_field is None:
        return "whole image"
    return _join_sides(tuple(dict.fromkeys(layer.receptive_field)))


def _join_sides(sides: tuple[int, ...]) -> str:
    return "x".join(str(side) for side in sides)


@app.command()
def ui(
    mlflow_port: Annotated[int, typer.Option(help="Port of MLflow's page.")] = 5000,
    prefect_port: Annotated[int, typer.Option(help="Port of Prefect's page.")] = 4200,
) -> None:
    """Open MLflow's and Prefect's pages over what was run, on loopback, until interrupted."""
    if mlflow_port == prefect_port:
        raise ConfigError(f"--mlflow-port and --prefect-port must differ; both are {mlflow_port}")
    store = os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
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


def main() -> None:
    """Entry point: an error is one sentence, with its traceback only where LOUPE_TRACEBACK asks for it."""
    try:
        app()
    except LoupeError as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
