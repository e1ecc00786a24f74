"""The recipes on one data set, from random weights to a fine-tuned network: a table, a page, MLflow's runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from loupe.config import Params, TrainClassifier
from loupe.evaluation.pictures import find_best_epoch
from loupe.experiments import (
    MLFLOW_PAGE,
    Experiment,
    Result,
    build_address,
    locate_weights,
    name_runs,
    run_experiments,
    write_time,
)
from loupe.models.weights import check_packaged
from loupe.reporting.charts import Measured, build_interval_chart
from loupe.reporting.page import render_page, save_page
from loupe.stages.entry import save_json
from loupe.stages.files import REPORTS, DataSet

TASK = "classifier"
TRAINS = {
    "scratch": "all, from random weights",
    "scratch_augmented": "the same, augmented",
    "features": "a head on frozen features",
    "features_augmented": "the same, augmented",
    "fine_tuned": "such a head, then all",
}
COURSE = {"scratch": 0.70, "scratch_augmented": 0.82, "features": 0.90, "features_augmented": 0.96, "fine_tuned": 0.97}
COURSE_SOURCE = "Chollet, Deep Learning with Python, chapter 5: 2,000 cats and dogs to train on"
FIGURES, PAGE = REPORTS / "ladder.json", REPORTS / "ladder.html"
TAG = "ladder"
NO_CHOICE = (
    "Nothing was chosen by the test figures: each recipe keeps its best epoch by val, and val is what to choose by."
)


@dataclass(frozen=True)
class Step:
    """What came of one recipe. Epochs count from 0, which is the head where one is trained.

    `figures` have the names of reports/metrics/classifier.json after the task: `test/accuracy`, `train/num_images`.
    """

    recipe: str
    best_epoch: int
    val_accuracy: float
    val_loss: float
    figures: Mapping[str, float]
    training_seconds: float
    run_id: str


@dataclass(frozen=True)
class Ladder:
    """All steps; `mlflow_id` is of the MLflow experiment that has their runs."""

    data_set: DataSet
    backbone: str
    steps: Sequence[Step]
    mlflow_id: str

    @property
    def address(self) -> str:
        """MLflow's page with the runs side by side."""
        return build_address(self.mlflow_id, [step.run_id for step in self.steps])


def climb_ladder(params: Params) -> None:
    """Train and test by each recipe, write reports/ladder.json and ladder.html, and end with a table.

    Raises:
        WeightsError: if the recipes that are pretrained lack their weights.
        PipelineError: if a recipe fails.
    """
    if params.train_classifier.weights == "auto":
        check_packaged(params.train_classifier.backbone)
    console = Console(highlight=False)
    experiments = [build_experiment(recipe, params.train_classifier) for recipe in TRAINS]
    results = run_experiments(experiments, TASK, params, lambda line: console.print(line, markup=False, soft_wrap=True))
    ladder = record_ladder(params.train_classifier.backbone, dict(zip(TRAINS, results, strict=True)))
    save_json(flatten_ladder(ladder), FIGURES)
    save_page(render_ladder(ladder), PAGE)
    console.print(build_table(ladder))
    console.print(_describe_ends(ladder), markup=False, soft_wrap=True)


def build_experiment(recipe: str, section: TrainClassifier) -> Experiment:
    """Pretrained weights are those of params.yaml, if there are any."""
    weights = "auto" if recipe.startswith("scratch") or section.weights == "none" else section.weights
    changes = {"train_classifier.recipe": recipe, "train_classifier.weights": locate_weights(weights)}
    return Experiment(f"ladder-{recipe}", changes)


def record_ladder(backbone: str, results: Mapping[str, Result]) -> Ladder:
    """Name and tag the MLflow run of each recipe, so that they are told apart where they are compared.

    Args:
        results: by recipe.

    Raises:
        TrackingError: if the store does not hold a run.
    """
    comparison = name_runs(results, TAG)
    steps = [_build_step(recipe, result, comparison.seconds[recipe]) for recipe, result in results.items()]
    return Ladder(next(iter(results.values())).data_set, backbone, steps, comparison.mlflow_id)


def _build_step(recipe: str, result: Result, training_seconds: float) -> Step:
    best = result.history.iloc[find_best_epoch(result.history)]
    return Step(
        recipe=recipe,
        best_epoch=int(best["epoch"]),
        val_accuracy=float(best["val/accuracy"]),
        val_loss=float(best["val/loss"]),
        figures={name.removeprefix(f"{TASK}/"): value for name, value in result.figures.items()},
        training_seconds=training_seconds,
        run_id=result.run_id,
    )


def flatten_ladder(ladder: Ladder) -> dict[str, Any]:
    """All of it under flat names, a recipe's under `<recipe>/`."""
    flat: dict[str, Any] = {f"data/{key}": value for key, value in vars(ladder.data_set).items()}
    flat |= {"backbone": ladder.backbone, "mlflow_page": ladder.address}
    for step in ladder.steps:
        values = {
            "best_epoch": step.best_epoch,
            "val/accuracy": step.val_accuracy,
            "val/loss": step.val_loss,
            **step.figures,
            "training_seconds": step.training_seconds,
            "run_id": step.run_id,
        }
        flat |= {f"{step.recipe}/{key}": value for key, value in values.items()}
    return flat


def build_table(ladder: Ladder) -> Table:
    """One row a recipe, for the terminal; 80 columns are enough."""
    title = f"{ladder.data_set.name}: {_describe_training(ladder)}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("recipe,\nand what it trains", overflow="fold")
    for heading in ("best\nepoch", "accuracy\non val", "accuracy on\ntest, 95%", "time\nmin:s"):
        table.add_column(heading, justify="right", overflow="fold")
    table.add_column("MLflow\nrun", overflow="fold")
    for step in ladder.steps:
        figures = step.figures
        interval = f"{figures['test/accuracy_low']:.3f} to {figures['test/accuracy_high']:.3f}"
        table.add_row(
            f"{step.recipe}\n  {TRAINS[step.recipe]}",
            str(step.best_epoch),
            f"{step.val_accuracy:.4f}",
            f"{figures['test/accuracy']:.4f}\n{interval}",
            write_time(step.training_seconds),
            step.run_id[:8],
        )
    return table


def _describe_training(ladder: Ladder) -> str:
    counts = ladder.steps[0].figures
    return (
        f"{ladder.backbone}, trained on {counts['train/num_images']:,.0f} images and tested on "
        f"{counts['test/num_images']:,.0f}"
    )


def _describe_ends(ladder: Ladder) -> str:
    """What a person reads below the table."""
    course = ", ".join(f"{recipe} {accuracy:.2f}" for recipe, accuracy in COURSE.items())
    return (
        f"{NO_CHOICE}\nIn the course: {course} ({COURSE_SOURCE}).\n"
        f"page: {PAGE} · figures: {FIGURES}\nside by side in MLflow: make ui, then {ladder.address}"
    )


def render_ladder(ladder: Ladder) -> str:
    """The page."""
    rows = [
        Measured(
            step.recipe.replace("_", " "),
            step.figures["test/accuracy"],
            step.figures["test/accuracy_low"],
            step.figures["test/accuracy_high"],
            step.val_accuracy,
        )
        for step in ladder.steps
    ]
    return render_page(
        "ladder.html.jinja",
        {
            "ladder": ladder,
            "training": _describe_training(ladder),
            "trains": TRAINS,
            "chart": build_interval_chart("accuracy on test and val by recipe", "accuracy", rows),
            "no_choice": NO_CHOICE,
            "course": COURSE,
            "course_source": COURSE_SOURCE,
            "mlflow_page": MLFLOW_PAGE,
            "tag": TAG,
            "write_time": write_time,
        },
    )
