"""The trainings that MLflow holds, for the terminal: one a row, or some of them side by side."""

from collections.abc import Callable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loupe.config import TASK_NAMES
from loupe.errors import ConfigError
from loupe.stages.files import LISTING, load_data_set
from loupe.tracking.records import (
    DATA_TAG,
    REPRODUCES_TAG,
    SHORT,
    Record,
    find_record,
    list_records,
    load_environment,
)
from loupe.tracking.runs import open_store

HEADLINES = {"classifier": ("accuracy", "log_loss"), "detector": ("image_auroc", "pixel_auroc")}
COMMIT_LENGTH = 7
TAGS = {"git_commit": "git commit", "git_tree": "git tree", "dvc_lock_sha256": "dvc.lock", DATA_TAG: "data"}
NONE = "–"


def show_runs(experiment: str | None, task: str | None, most: int) -> None:
    """Print the trainings of an experiment, the newest first; without a name, of the present data's.

    Raises:
        ConfigError: if there is no such task, or no data yet to go by.
        TrackingError: if the store has no such experiment.
    """
    if task is not None and task not in TASK_NAMES:
        raise ConfigError(f"--task must be {' or '.join(TASK_NAMES)}, got {task!r}")
    if experiment is None and not LISTING.exists():
        raise ConfigError(f"{LISTING} does not exist, which names the data: give --experiment, or run the stages first")
    name = experiment or load_data_set().name
    records = list_records(open_store(), name, task, most)
    Console(highlight=False).print(build_list(name, records) if records else f"{name} has no trainings yet")


def compare_runs(run_ids: Sequence[str]) -> None:
    """Print in what runs differ, and their figures side by side.

    Raises:
        TrackingError: if the store does not hold one of them, or an abbreviation names several.
    """
    client = open_store()
    records = [find_record(client, run_id) for run_id in run_ids]
    console = Console(highlight=False)
    console.print(build_differences(records, [load_environment(record) for record in records]))
    console.print(build_figures(records))


def build_list(name: str, records: Sequence[Record]) -> Table:
    """One row a training; 80 columns are enough."""
    table = _build_table(f"{name}: trainings, the newest first")
    for heading in ("run", "when\n(UTC)", "trained", "on test, with 95%", "version", "commit"):
        table.add_column(heading, overflow="fold")
    for record in records:
        table.add_row(
            record.run_id[:SHORT],
            f"{record.start:%Y-%m-%d\n%H:%M:%S}",
            escape(f"{record.task}\n{record.model.replace(' ', chr(10))}"),
            escape(_describe_result(record)),
            "\n".join([record.version or NONE, *record.aliases]),
            _describe_commit(record),
        )
    return table


def _describe_result(record: Record) -> str:
    """Its main figures; of a training that did not end well, its reason."""
    if record.status != "FINISHED":
        return f"{record.status}: {record.failure}" if record.failure else record.status
    names = [f"{record.task}/test/{name}" for name in HEADLINES[record.task]]
    told = [
        f"{name.rpartition('/')[2]} {_break(write_figure(record.metrics, name))}"
        for name in names
        if name in record.metrics
    ]
    made_again = record.tags.get(REPRODUCES_TAG)
    return "\n".join([*(told or ["not tested yet"]), *([f"makes {made_again[:SHORT]} again"] if made_again else [])])


def _describe_commit(record: Record) -> str:
    if record.commit is None:
        return NONE
    return record.commit[:COMMIT_LENGTH] + ("" if record.is_clean else "\nchanged")


def build_differences(records: Sequence[Record], environments: Sequence[Mapping[str, object]]) -> Table:
    """One row a param, commit, digest, package or device that is not the same in all of these runs."""
    table = _build_comparison("What differs", records)
    facts = [_list_facts(record, environment) for record, environment in zip(records, environments, strict=True)]
    _add_rows(table, facts, lambda values: len(set(values)) > 1)
    if not table.row_count:
        table.add_row("nothing: code, params, data and environment are the same")
    return table


def _list_facts(record: Record, environment: Mapping[str, object]) -> dict[str, str]:
    """Commits and digests are shortened."""
    tags = {title: record.tags[tag][:SHORT] for tag, title in TAGS.items() if tag in record.tags}
    facts = {"task": record.task, "status": record.status, **tags, **record.params}
    return facts | {f"environment: {key}": str(value) for key, value in environment.items()}


def build_figures(records: Sequence[Record]) -> Table:
    """One row a figure that any of these runs has, without those of single labels and of the export.

    Intervals stand below their figures. Where all are of one task, its name is left out.
    """
    table = _build_comparison("Figures", records)
    table.columns[0].no_wrap = True
    start = f"{records[0].task}/" if len({record.task for record in records}) == 1 else ""
    shown = [
        {name.removeprefix(start): _break(write_figure(record.metrics, name)) for name in _list_shown(record)}
        for record in records
    ]
    _add_rows(table, shown, lambda values: True)
    return table


def _list_shown(record: Record) -> list[str]:
    bounds = {f"{name}_{end}" for name in record.metrics for end in ("low", "high")}
    return [
        name
        for name in sorted(record.metrics)
        if name.startswith(f"{record.task}/")
        and name not in bounds
        and name.count("/") <= 2
        and not name.startswith(f"{record.task}/export/")
    ]


def _break(figure: str) -> str:
    """Its interval on a line of its own."""
    return figure.replace(" (", "\n  (")


def _build_comparison(title: str, records: Sequence[Record]) -> Table:
    table = _build_table(title)
    for heading in ("", *(f"{record.run_id[:SHORT]}\n{record.start:%Y-%m-%d %H:%M}" for record in records)):
        table.add_column(heading, overflow="fold")
    return table


def _build_table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))


def _add_rows(table: Table, columns: Sequence[Mapping[str, str]], is_wanted: Callable[[Sequence[str]], bool]) -> None:
    """A row a name that any of the columns has."""
    for name in dict.fromkeys(name for column in columns for name in column):
        values = [column.get(name, NONE) for column in columns]
        if is_wanted(values):
            table.add_row(escape(name), *map(escape, values))


def write_figure(metrics: Mapping[str, float], name: str) -> str:
    """Its value, with its 95% interval where it has one; counts are whole."""
    value = metrics[name]
    text = f"{value:,.0f}" if "/num_" in name else f"{value:.4f}"
    if f"{name}_low" not in metrics:
        return text
    return f"{text} ({metrics[f'{name}_low']:.4f} to {metrics[f'{name}_high']:.4f})"
