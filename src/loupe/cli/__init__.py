"""From a folder of images to a promoted classifier and anomaly detector."""

import typer

from loupe.cli import making, operating, starting
from loupe.cli.params import change_params
from loupe.stages.entry import ending_in_a_sentence

__all__ = ["app", "change_params", "main"]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
bench = typer.Typer(no_args_is_help=True, help="Compare what there is to choose from on one data set.")
for command in (
    starting.run,
    operating.promote,
    operating.history,
    operating.rollback,
    operating.forget,
    making.ladder,
    operating.runs,
    making.reproduce,
    making.reconstruct,
    operating.score,
    operating.drift,
    making.model,
    starting.ui,
):
    app.command()(command)
bench.command()(making.detectors)
app.add_typer(bench, name="bench")


def main() -> None:
    """Entry point: an error is one sentence, with its traceback only where LOUPE_TRACEBACK asks for it."""
    with ending_in_a_sentence():
        app()
