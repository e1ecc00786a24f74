"""The detectors on one data set, over seeds: a table, a page, MLflow's runs."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

from rich import box
from rich.console import Console
from rich.table import Table

from loupe.config import Params, TrainDetector
from loupe.data.sources import list_images
from loupe.errors import ConfigError, DataError, PipelineError
from loupe.experiments import (
    MLFLOW_PAGE,
    Comparison,
    Experiment,
    Result,
    locate_weights,
    name_runs,
    try_experiments,
    write_time,
)
from loupe.reporting.charts import IntervalChart, Measured, build_interval_chart
from loupe.reporting.page import render_page, save_page
from loupe.stages.entry import save_json
from loupe.stages.files import BUILT_IN, REPORTS, DataSet
from loupe.tracking.logged_models import NUM_TIMED, load_model, measure_latencies

TASK, TAG = "detector", "detector_bench"
NAMES: tuple[str, ...] = get_args(TrainDetector.model_fields["model"].annotation)
SCORES = {"test/image_auroc": "image AUROC", "test/pixel_auroc": "pixel AUROC", "test/aupro": "AUPRO"}
FIGURES, PAGE = REPORTS / "detector_bench.json", REPORTS / "detector_bench.html"
NO_CHOICE = (
    "Nothing was chosen by the test figures: each detector was fitted to normal images alone, with the params as they "
    "are, and the rows stand in a fixed order. Who chooses a detector by this table has used up its test images: "
    "confirm it on others."
)
UNKNOWN = "–"  # where a figure is not known


class Spread(NamedTuple):
    """A figure over seeds; `deviation` is the sample standard deviation, None of one seed."""

    mean: float
    deviation: float | None
    low: float
    high: float


@dataclass(frozen=True)
class Cost:
    """What a detector takes once it is fitted: milliseconds of an image by itself and in a batch, bytes on disk."""

    alone: float
    in_batch: float
    num_bytes: int


@dataclass(frozen=True)
class Member:
    """What came of one detector, by seed: figures and run of those that were fitted, one sentence of those that failed.

    `figures` have the names of reports/metrics/detector.json after the task, and `train/seconds`.
    """

    name: str
    figures: Mapping[int, Mapping[str, float]]
    run_ids: Mapping[int, str]
    problems: Mapping[int, str]
    cost: Cost | None

    def spread(self, figure: str) -> Spread | None:
        """None where no seed has the figure."""
        values = [figures[figure] for figures in self.figures.values() if figure in figures]
        return compute_spread(values) if values else None


@dataclass(frozen=True)
class Bench:
    """All members on one data set."""

    data_set: DataSet
    seeds: Sequence[int]
    members: Sequence[Member]
    comparison: Comparison

    @property
    def problems(self) -> list[tuple[str, str]]:
        """Member and seed, and what kept it from being fitted."""
        return [
            (f"{member.name}, seed {seed}", sentence)
            for member in self.members
            for seed, sentence in member.problems.items()
        ]


def compute_spread(values: Sequence[float]) -> Spread:
    """Over at least one value."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), deviation, min(values), max(values))


def bench_detectors(params: Params, source: Path | None, names: Sequence[str], seeds: Sequence[int]) -> None:
    """Fit and test each detector with each seed, write reports/detector_bench.json and .html, and end with a table.

    Args:
        source: a folder of images, instead of that of params.yaml.

    Raises:
        ConfigError: if there is no such detector, or a seed is none.
        DataError: if there are no images.
        PipelineError: if not one detector can be fitted.
    """
    console = Console(highlight=False)
    experiments = build_experiments(params, source, names, seeds)
    images = list_timed_images(source or Path(params.ingest.source), params.ingest.layout)
    outcomes = try_experiments(
        list(experiments.values()), TASK, params, lambda line: console.print(line, markup=False, soft_wrap=True)
    )
    bench = record_bench(dict(zip(experiments, outcomes, strict=True)), images)
    save_json(flatten_bench(bench), FIGURES)
    save_page(render_bench(bench), PAGE)
    console.print(build_table(bench))
    console.print(_describe_ends(bench), markup=False, soft_wrap=True)


def build_experiments(
    params: Params, source: Path | None, names: Sequence[str], seeds: Sequence[int]
) -> dict[tuple[str, int], Experiment]:
    """One for each detector and seed, in the family's order.

    Raises:
        ConfigError: if there is no such detector, or a seed is none.
    """
    unknown = sorted(set(names) - set(NAMES))
    if unknown or not names:
        raise ConfigError(f"--models takes some of {', '.join(NAMES)}; got {', '.join(unknown) or 'none'}")
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ConfigError(f"--seeds takes different whole numbers from 0 on, such as 0,1,2; got {list(seeds)}")
    weights = locate_weights(params.train_detector.weights)
    given = {} if source is None else {"ingest.source": (source if source == BUILT_IN else source.resolve()).as_posix()}
    return {
        (name, seed): Experiment(
            f"bench-{name}-{seed}",
            {**given, "seed": seed, "train_detector.model": name, "train_detector.weights": weights},
        )
        for name in NAMES
        if name in names
        for seed in seeds
    }


def list_timed_images(source: Path, layout: str) -> list[Path]:
    """The first images of a folder, as many as one batch has.

    Raises:
        DataError: if there are none.
    """
    if source == BUILT_IN and not source.exists():
        raise DataError(f"{source} is not made yet: `loupe run` makes it, or give a folder of images")
    return [source / path for path in list_images(source, layout).rows["path"].head(NUM_TIMED)]


def record_bench(outcomes: Mapping[tuple[str, int], Result | PipelineError], images: Sequence[Path]) -> Bench:
    """Name and tag the MLflow runs, and measure the models that they logged, one of each detector.

    Args:
        outcomes: by detector and seed.
        images: what the models' time is taken on.

    Raises:
        PipelineError: if not one detector was fitted.
        TrackingError: if the store does not hold a run.
    """
    results = {key: outcome for key, outcome in outcomes.items() if isinstance(outcome, Result)}
    problems = {key: str(outcome) for key, outcome in outcomes.items() if isinstance(outcome, PipelineError)}
    if not results:
        raise PipelineError(f"not one detector could be fitted: {next(iter(problems.values()))}")
    comparison = name_runs({_name_run(*key): result for key, result in results.items()}, TAG)
    first = {name: result for (name, _), result in reversed(results.items())}
    costs = dict(zip(first, measure_costs(list(first.values()), images), strict=True))
    names = list(dict.fromkeys(name for name, _ in outcomes))
    return Bench(
        data_set=next(iter(results.values())).data_set,
        seeds=list(dict.fromkeys(seed for _, seed in outcomes)),
        members=[_build_member(name, results, problems, comparison, costs.get(name)) for name in names],
        comparison=comparison,
    )


def _name_run(name: str, seed: int) -> str:
    return f"{name}-{seed}"


def _build_member(
    name: str,
    results: Mapping[tuple[str, int], Result],
    problems: Mapping[tuple[str, int], str],
    comparison: Comparison,
    cost: Cost | None,
) -> Member:
    own = {seed: result for (other, seed), result in results.items() if other == name}
    figures = {
        seed: {figure.removeprefix(f"{TASK}/"): value for figure, value in result.figures.items()}
        | {"train/seconds": comparison.seconds[_name_run(name, seed)]}
        for seed, result in own.items()
    }
    return Member(
        name=name,
        figures=figures,
        run_ids={seed: result.run_id for seed, result in own.items()},
        problems={seed: sentence for (other, seed), sentence in problems.items() if other == name},
        cost=cost,
    )


def measure_costs(results: Sequence[Result], images: Sequence[Path]) -> list[Cost]:
    """What the logged models take, as MLflow loads them and decoding included.

    All are in this process and take turns, so that what else the machine does slows them alike. Of images one by one it
    is the median over different images.
    """
    models = [load_model(result.model_uri) for result in results]
    in_batch = measure_latencies(models, images)
    alone = zip(*(measure_latencies(models, [image]) for image in images), strict=True)
    return [
        Cost(statistics.median(taken), batch, model.num_bytes)
        for taken, batch, model in zip(alone, in_batch, models, strict=True)
    ]


def flatten_bench(bench: Bench) -> dict[str, Any]:
    """All of it under flat names: a detector's under `<name>/`, what is of one seed under `<name>/seed_<seed>/`."""
    flat: dict[str, Any] = {f"data/{key}": value for key, value in vars(bench.data_set).items()}
    flat |= {"seeds": " ".join(map(str, bench.seeds)), "mlflow_page": bench.comparison.address}
    for member in bench.members:
        values: dict[str, Any] = {}
        for figure in (*SCORES, "train/seconds"):
            spread = member.spread(figure)
            if spread is not None:
                named = {f"{figure}_{key}": value for key, value in spread._asdict().items() if value is not None}
                values |= named
        if member.cost is not None:
            values |= {
                "milliseconds_alone": member.cost.alone,
                "milliseconds_in_batch": member.cost.in_batch,
                "num_bytes": member.cost.num_bytes,
            }
        for seed, figures in member.figures.items():
            values |= {f"seed_{seed}/{key}": value for key, value in figures.items()}
            values[f"seed_{seed}/run_id"] = member.run_ids[seed]
        values |= {f"seed_{seed}/problem": sentence for seed, sentence in member.problems.items()}
        flat |= {f"{member.name}/{key}": value for key, value in values.items()}
    return flat


def build_table(bench: Bench) -> Table:
    """One row a detector, for the terminal; 80 columns are enough."""
    table = Table(
        title=f"{bench.data_set.name}: {_describe_seeds(bench)}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("detector", overflow="fold")
    scores = [heading.replace(" ", "\n") for heading in SCORES.values()]
    for heading in (*scores, "fit\nmin:s", "one image\nms", "in batch\nms", "MB"):
        table.add_column(heading, justify="right", overflow="fold")
    for member in bench.members:
        table.add_row(member.name.replace("_auto", "_\n  auto"), *_write_cells(member))
    return table


def _describe_seeds(bench: Bench) -> str:
    seeds = ", ".join(map(str, bench.seeds))
    return f"mean ± standard deviation over the seeds {seeds}" if len(bench.seeds) > 1 else f"seed {seeds}"


def _write_cells(member: Member) -> list[str]:
    cells = [write_spread(member.spread(figure)) for figure in SCORES]
    seconds = member.spread("train/seconds")
    cells.append(UNKNOWN if seconds is None else write_time(seconds.mean))
    if member.cost is None:
        return [*cells, UNKNOWN, UNKNOWN, UNKNOWN]
    cost = member.cost
    return [*cells, f"{cost.alone:.1f}", f"{cost.in_batch:.1f}", f"{cost.num_bytes / 1e6:.1f}"]


def write_spread(spread: Spread | None) -> str:
    """Mean, and below it the deviation if there is one."""
    if spread is None:
        return UNKNOWN
    return f"{spread.mean:.4f}" + (f"\n± {spread.deviation:.4f}" if spread.deviation is not None else "")


def _describe_ends(bench: Bench) -> str:
    """What a person reads below the table."""
    lines = [f"{who} was not fitted: {sentence}" for who, sentence in bench.problems]
    return "\n".join(
        [
            *lines,
            NO_CHOICE,
            f"page: {PAGE} · figures: {FIGURES}",
            f"side by side in MLflow: make ui, then {bench.comparison.address}",
        ]
    )


def render_bench(bench: Bench) -> str:
    """The page."""
    return render_page(
        "detector_bench.html.jinja",
        {
            "bench": bench,
            "seeds": _describe_seeds(bench),
            "scores": SCORES,
            "chart": _build_chart(bench),
            "no_choice": NO_CHOICE,
            "num_timed": NUM_TIMED,
            "mlflow_page": MLFLOW_PAGE,
            "tag": TAG,
            "unknown": UNKNOWN,
            "write_time": write_time,
        },
    )


def _build_chart(bench: Bench) -> IntervalChart | None:
    """None where no detector has an image AUROC, for lack of anomalous test images."""
    spreads = [(member.name.replace("_", " "), member.spread("test/image_auroc")) for member in bench.members]
    rows = [
        Measured(name, spread.mean, spread.low, spread.high, spread.mean)
        for name, spread in spreads
        if spread is not None
    ]
    return build_interval_chart("image AUROC by detector", "image AUROC", rows) if rows else None
