"""What was found of drift, for people and programs: a sentence, flat figures, a page and a table."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int64
from rich import box
from rich.table import Table

from loupe.config import Drift
from loupe.data.images import open_image
from loupe.errors import DataError
from loupe.evaluation.drift import EMBEDDING, SCORE, Comparison, DriftJudgement, Sample, compute_smallest_effect
from loupe.reporting.charts import ScoreChart, build_score_chart
from loupe.reporting.page import embed_picture, render_page

TASK = "drift"
NAMES = {EMBEDDING: "embeddings", SCORE: "anomaly scores"}
PICTURE_SIDE = 160  # pixels


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
            f"{report.rules.min_images} of each (drift.min_images)."
        )
    describe = {EMBEDDING: _describe_embeddings, SCORE: _describe_scores}
    said = [f"{describe[name](one)} (p = {one.p_value:.3g})" for name, one in judgement.comparisons.items()]
    start = "The recent images have drifted" if judgement.is_drifted else "No drift was found"
    return f"{start}: {'; '.join(said)}."


def _describe_embeddings(one: Comparison) -> str:
    if not one.is_drifted:
        return "their embeddings do not differ clearly more than by chance"
    return f"by their embeddings they differ {one.strength}, and are told apart in {one.effect:.0%} of pairs"


def _describe_scores(one: Comparison) -> str:
    if not one.is_drifted:
        return "their anomaly scores do not differ clearly more than by chance"
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
