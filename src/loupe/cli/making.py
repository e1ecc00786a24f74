"""Commands that make models to compare, make one again, and show what is in one."""

import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loupe.config import load_params
from loupe.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from loupe.models.explain import Explanation, Layer


def ladder() -> None:
    """Train and test by each recipe, from scratch to fine-tuned, and compare them; the working copy stays as it is."""
    from loupe.ladder import climb_ladder  # mlflow and DVC take seconds

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    climb_ladder(load_params())


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
    bench_detectors(load_params(), None if data is None else data.expanduser(), names, numbers)


def _parse_list(text: str) -> list[str]:
    """What commas or spaces divide."""
    return re.findall(r"[^,\s]+", text)


def _parse_seed(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f"--seeds takes whole numbers from 0 on, such as 0,1,2; got {text!r}")
    return int(text)


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
