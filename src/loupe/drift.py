"""Whether recent images are still like those that a model was made for: two tests, a page, an MLflow run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from jaxtyping import Int64
from rich import box
from rich.console import Console
from rich.table import Table

from loupe.config import Drift, Params
from loupe.data.images import open_image
from loupe.data.manifest import load_table
from loupe.data.sources import name_source
from loupe.errors import DataError, TrackingError
from loupe.evaluation.drift import (
    EMBEDDING,
    SCORE,
    Comparison,
    DriftJudgement,
    Sample,
    compute_smallest_effect,
    judge_drift,
)
from loupe.reporting.charts import ScoreChart, build_score_chart
from loupe.reporting.page import embed_picture, render_page, save_page
from loupe.scoring import Request, list_source, score_images
from loupe.stages.entry import save_json
from loupe.stages.files import LISTING, MANIFEST, REFERENCE, REPORTS, load_data_set
from loupe.tracking.loading import MlflowClient, ModelVersion, find_folder, find_named
from loupe.tracking.runs import connect, log_results, start_run

FIGURES, PAGE = REPORTS / "drift.json", REPORTS / "drift.html"
SCORES = REPORTS / "drift" / "scores.parquet"  # of images that come as a folder
TASK = "drift"
NAMES = {EMBEDDING: "embeddings", SCORE: "anomaly scores"}
PICTURE_SIDE = 160  # pixels
COMMAND = "`loupe score IMAGES --embeddings --out scores.parquet`"


@dataclass(frozen=True)
class Images:
    """Images to compare, a row each: `path`, `embedding` and, of a detector, `anomaly_score`.

    Those that share a value of `group`, if there is that column, are not independent of each other. `folder` is where
    the paths start, None where it is not known.
    """

    rows: pd.DataFrame
    folder: Path | None

    @property
    def sample(self) -> Sample:
        """What the tests look at."""
        scores = self.rows["anomaly_score"].to_numpy(np.float64) if "anomaly_score" in self.rows else None
        return Sample(np.stack(list(self.rows["embedding"])), scores, _number_groups(self.rows))

    @property
    def has_groups(self) -> bool:
        """Whether it is known of any image which others it belongs to."""
        return "group" in self.rows and bool(self.rows["group"].notna().any())


def _number_groups(rows: pd.DataFrame) -> Int64[np.ndarray, " num_images"] | None:
    """An image without a group is one of its own."""
    if "group" not in rows:
        return None
    names = [str(name) if pd.notna(name) else row for row, name in enumerate(rows["group"])]
    return np.asarray(pd.factorize(pd.Series(names, dtype=object))[0], np.int64)


@dataclass(frozen=True)
class Report:
    """What the page and the figures show.

    `model` is the version that both kinds of images were scored by. `num_unreadable` of the recent images could not be
    read, and `num_left_out` others were not drawn.
    """

    model: str
    source: Path
    reference: Images
    recent: Images
    num_unreadable: int
    num_left_out: int
    rules: Drift
    judgement: DriftJudgement


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
        return pd.read_parquet(SCORES), list_source(source)[0]
    if not source.exists():
        raise DataError(f"{source} does not exist: name a folder of images, or a table that {COMMAND} wrote")
    try:
        table = pd.read_parquet(source)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{source} is no Parquet table: {COMMAND} writes one") from error
    lacking = [column for column in ("path", "embedding") if column not in table]
    if lacking:
        raise DataError(f"{source} has no column {' or '.join(lacking)}: {COMMAND} writes them")
    if table["embedding"].isna().all():
        raise DataError(f"{source} holds no embedding: none of its {len(table):,} images could be read")
    return table, images or source.parent


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


def flatten_report(report: Report) -> dict[str, Any]:
    """All figures under flat names; those of the tests are left out where there were too few images."""
    judgement = report.judgement
    flat: dict[str, Any] = {
        "is_drifted": judgement.is_drifted,
        "is_decided": judgement.is_decided,
        "verdict": describe_verdict(report),
        "model": report.model,
        "source": str(report.source),
        "num_recent": judgement.num_recent,
        "num_reference": judgement.num_reference,
        "num_recent_groups": judgement.num_recent_groups,
        "num_reference_groups": judgement.num_reference_groups,
        "num_left_out": report.num_left_out,
        "num_unreadable": report.num_unreadable,
        "false_alarm_rate": report.rules.false_alarm_rate,
    }
    for name, one in judgement.comparisons.items():
        flat |= {
            f"{name}/p_value": one.p_value,
            f"{name}/effect": one.effect,
            f"{name}/effect_low": one.interval.low,
            f"{name}/effect_high": one.interval.high,
            f"{name}/is_drifted": one.is_drifted,
        }
    return {f"{TASK}/{key}": value for key, value in flat.items()}


def describe_verdict(report: Report) -> str:
    """The result in a sentence: whether they drifted, by which test, and how strongly."""
    judgement = report.judgement
    if not judgement.is_decided:
        return (
            f"Too few images to say: there are {judgement.num_recent_groups:,} recent and "
            f"{judgement.num_reference_groups:,} reference ones that are independent of each other, and it takes "
            f"{report.rules.min_images} of each."
        )
    describe = {EMBEDDING: _describe_embeddings, SCORE: _describe_scores}
    said = [f"{describe[name](one)} (p = {one.p_value:.3g})" for name, one in judgement.comparisons.items()]
    start = "The recent images have drifted" if judgement.is_drifted else "No drift was found"
    return f"{start}: {'; '.join(said)}."


def _describe_embeddings(one: Comparison) -> str:
    if not one.is_drifted:
        return "their embeddings differ no more than by chance"
    return f"by their embeddings they differ {one.strength}, and are told apart in {one.effect:.0%} of pairs"


def _describe_scores(one: Comparison) -> str:
    if not one.is_drifted:
        return "their anomaly scores differ no more than by chance"
    if one.interval.low <= 0.5 <= one.interval.high:
        return "their anomaly scores spread differently, though neither kind scores higher"
    higher, part = ("higher", one.effect) if one.effect > 0.5 else ("lower", 1 - one.effect)
    return f"their anomaly scores are {one.strength} {higher}, in {part:.0%} of pairs"


def render_report(report: Report) -> str:
    """The page."""
    judgement, rules = report.judgement, report.rules
    counts = (judgement.num_reference_groups, judgement.num_recent_groups)
    rate = rules.false_alarm_rate / max(1, len(judgement.comparisons))
    return render_page(
        "drift.html.jinja",
        {
            "report": report,
            "verdict": describe_verdict(report),
            "mark": "ok" if judgement.is_decided and not judgement.is_drifted else "warning",
            "names": NAMES,
            "has_groups": report.recent.has_groups or report.reference.has_groups,
            "moved": _list_moved(report) if judgement.is_decided else [],
            "charts": _build_charts(report) if judgement.is_decided else [],
            "smallest_effect": compute_smallest_effect(*counts, rate) if judgement.is_decided else None,
            "smallest_p_value": 1 / (1 + rules.num_permutations),
        },
    )


def _list_moved(report: Report) -> list[dict[str, Any]]:
    """The recent images that moved most, each beside the reference image that is nearest to it."""
    judgement = report.judgement
    strangeness = judgement.compute_strangeness()
    shown = []
    for position in judgement.find_moved_most(report.rules.num_pictures):
        pair = (report.recent, position), (report.reference, int(judgement.nearest[position]))
        shown.append({"strangeness": strangeness[position], "images": [_describe_image(*one) for one in pair]})
    return shown


def _describe_image(images: Images, position: int) -> dict[str, Any]:
    """Its path, its score and its picture; the latter two None where there is none."""
    row = images.rows.iloc[position]
    path: str = row["path"]
    return {"path": path, "score": row.get("anomaly_score"), "picture": _embed(images.folder, path)}


def _embed(folder: Path | None, path: str) -> str | None:
    try:
        return None if folder is None else embed_picture(open_image(folder / path), PICTURE_SIDE)
    except DataError:
        return None


def _build_charts(report: Report) -> list[ScoreChart]:
    """Histograms of the reference above, of recent images below: of scores, where there are any, and of the witness."""
    reference, recent = report.reference.sample.scores, report.recent.sample.scores
    charts = []
    if reference is not None and recent is not None:
        charts.append(_build_chart("anomaly score (raw)", reference, recent))
    witness, count = report.judgement.witness, report.judgement.num_reference
    charts.append(_build_chart("how recent an image looks", witness[:count], witness[count:]))
    return charts


def _build_chart(name: str, reference: np.ndarray, recent: np.ndarray) -> ScoreChart:
    title = f"{name}, of reference and of recent images"
    return build_score_chart(title, ("reference", "recent"), reference, recent, np.empty(0))._replace(x_name=name)


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


def build_table(report: Report) -> Table:
    """One row a test, for the terminal; 80 columns are enough."""
    judgement = report.judgement
    title = f"{judgement.num_recent:,} recent images, {judgement.num_reference:,} of the reference of {report.model}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("test of")
    for heading in ("AUROC\n(0.5: alike)", "95%", "p-value"):
        table.add_column(heading, justify="right")
    table.add_column("drifted")
    for name, one in judgement.comparisons.items():
        interval = f"{one.interval.low:.3f} to {one.interval.high:.3f}"
        said = f"yes, {one.strength}" if one.is_drifted else "not found"
        table.add_row(NAMES[name], f"{one.effect:.3f}", interval, f"{one.p_value:.3g}", said)
    return table
