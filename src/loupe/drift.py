"""Whether recent images are still like those that a model was made for: two tests, a page, an MLflow run."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from rich.console import Console

from loupe.config import Params
from loupe.data.manifest import load_table
from loupe.data.sources import name_source
from loupe.drift_report import TASK, Images, Report, build_table, describe_verdict, flatten_report, render_report
from loupe.errors import DataError, TrackingError
from loupe.evaluation.drift import judge_drift
from loupe.reporting.page import save_page
from loupe.scoring import Request, list_source, score_images
from loupe.stages.entry import save_json
from loupe.stages.files import LISTING, MANIFEST, REFERENCE, REPORTS, load_data_set
from loupe.tracking.loading import MlflowClient, ModelVersion, find_folder, find_named
from loupe.tracking.runs import connect, log_results, start_run

FIGURES, PAGE = REPORTS / "drift.json", REPORTS / "drift.html"
SCORES = REPORTS / "drift" / "scores.parquet"  # of images that come as a folder
COMMAND = "`loupe score IMAGES --embeddings --out scores.parquet`"


def check_drift(params: Params, source: Path, model: str, images: Path | None) -> None:
    """Compare, write reports/drift.json and drift.html, add a run to MLflow, and end with a table.

    Args:
        source: a table that `loupe score --embeddings` wrote, or a folder of images, which are scored first.
        model: an alias of the present data's models, such as `champion`, or `<name>@<alias>` or `<name>/<version>`.
        images: where the table's paths start, for the pictures; the table's own folder if None.

    Raises:
        DataError: if the table is not what it must be.
        TrackingError: if there is no such model, or it has no reference.
    """
    table, folder = _load_recent(source, model, images)
    client, version = _find_model(table, model)
    name = f"{version.name}/{version.version}"
    _check_origin(table, name, source)
    readable = table[table["embedding"].notna()]
    recent = Images(_draw(readable, params), folder)
    reference = Images(_draw(_load_reference(version), params), _find_data())
    _check_embeddings(recent, reference, source, name)
    report = Report(
        model=name,
        source=source,
        reference=reference,
        recent=recent,
        num_unreadable=len(table) - len(readable),
        num_left_out=len(readable) - len(recent.rows),
        rules=params.drift,
        judgement=judge_drift(reference.sample, recent.sample, params.drift, params.seed),
    )
    save_json(flatten_report(report), FIGURES)
    save_page(render_report(report), PAGE)
    _record(client, report, params)
    _tell(report)


def _load_recent(source: Path, model: str, images: Path | None) -> tuple[pd.DataFrame, Path]:
    """The table of the recent images, and where its paths start."""
    if source.is_dir():
        score_images(Request(source, model, SCORES, embeddings=True))
        return _check_table(pd.read_parquet(SCORES), source), list_source(source)[0]
    if not source.exists():
        raise DataError(f"{source} does not exist: name a folder of images, or a table that {COMMAND} wrote")
    try:
        table = pd.read_parquet(source)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{source} is no Parquet table: {COMMAND} writes one") from error
    return _check_table(table, source), images or source.parent


def _check_table(table: pd.DataFrame, source: Path) -> pd.DataFrame:
    if "problem" in table and table["problem"].notna().all():
        raise DataError(f"none of the {len(table):,} images of {source} could be read: {table['problem'].iloc[0]}")
    lacking = [column for column in ("path", "embedding") if column not in table]
    if lacking:
        raise DataError(f"{source} has no column {' or '.join(lacking)}: {COMMAND} writes them")
    if table["embedding"].isna().all():
        raise DataError(f"{source} holds no embedding: {COMMAND} writes them")
    return table


def _find_model(table: pd.DataFrame, model: str) -> tuple[MlflowClient, ModelVersion]:
    """The registered version that is meant: of the detector, where one has scored the table."""
    data_set = load_data_set().name if LISTING.exists() else name_source(Path.cwd())
    client = connect(data_set)
    task = "detector" if "anomaly_score" in table else "classifier"
    name = model if "@" in model or "/" in model else f"{data_set}-{task}@{model}"
    version = find_named(client, name)
    if version is None:
        raise TrackingError(f"MLflow's registry has no model {name}: `loupe promote` makes champions")
    return client, version


def find_reference(version: ModelVersion) -> Path:
    """The table of images that training left beside a version, and that the version was not fitted to.

    Raises:
        TrackingError: if it left none.
    """
    path = find_folder(version) / REFERENCE
    if not path.exists():
        raise TrackingError(
            f"version {version.version} of {version.name} has no {REFERENCE} to compare with, as it was trained before "
            "drift was checked: train it anew and promote it, by `dvc repro --force` and `loupe promote`"
        )
    return path


def _load_reference(version: ModelVersion) -> pd.DataFrame:
    """With the groups that the present data set gives its images, where the table has none of its own."""
    rows = pd.read_parquet(find_reference(version))
    if "group" in rows or not MANIFEST.exists():
        return rows
    groups = load_table(MANIFEST).drop_duplicates("image_id").set_index("image_id")["group"]
    return rows.assign(group=rows["image_id"].map(groups))


def _find_data() -> Path | None:
    """Where the paths of the reference start: the present data set's folder."""
    return Path(load_data_set().source) if LISTING.exists() else None


def _draw(rows: pd.DataFrame, params: Params) -> pd.DataFrame:
    """At most as many as are compared."""
    drawn = rows.sample(min(len(rows), params.drift.max_images), random_state=params.seed)
    return drawn.sort_index().reset_index(drop=True)


def _check_origin(table: pd.DataFrame, name: str, source: Path) -> None:
    """Embeddings of two versions lie in two spaces, whatever their length."""
    column = next((column for column in ("detector", "classifier") if column in table), None)
    others = [] if column is None else sorted(set(table[column].dropna()) - {name})
    if others:
        raise DataError(
            f"{source} was scored by {' and '.join(others)}, and can't be compared with the reference of {name}: "
            f"score the images anew, by {COMMAND}, or name its model by --model {others[0]}"
        )


def _check_embeddings(recent: Images, reference: Images, source: Path, name: str) -> None:
    lengths = [sorted({len(one) for one in images.rows["embedding"]}) for images in (recent, reference)]
    if lengths[0] != lengths[1]:
        said = [" or ".join(map(str, one)) for one in lengths]
        raise DataError(
            f"embeddings in {source} have {said[0]} values, and those of {name} have {said[1]}: score the images by "
            "that model"
        )
    columns = [column for column in ("embedding", "anomaly_score") if column in recent.rows]
    if not all(np.isfinite(np.stack(list(recent.rows[column]))).all() for column in columns):
        raise DataError(f"{source} holds values that are not finite: score the images anew, by {COMMAND}")


def _record(client: MlflowClient, report: Report, params: Params) -> None:
    figures = flatten_report(report)
    metrics = {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}
    given = {TASK: params.drift.model_dump(), "seed": params.seed, "model": report.model, "source": str(report.source)}
    tags = {"task": TASK, "verdict": describe_verdict(report)}
    with start_run(TASK, given, tags) as run_id:
        log_results(client, run_id, metrics=metrics, files=[FIGURES, PAGE])


def _tell(report: Report) -> None:
    console = Console(highlight=False)
    if report.judgement.is_decided:
        console.print(build_table(report))
    console.print(f"{describe_verdict(report)}\npage: {PAGE} · figures: {FIGURES}", markup=False, soft_wrap=True)
