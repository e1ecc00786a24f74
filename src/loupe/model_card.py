"""What a version is, for those who are to use it: made from the record, kept with the run and with the version."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from loupe.data.images import Geometry
from loupe.data.manifest import load_table
from loupe.errors import DataError
from loupe.evaluation.thresholds import explain_threshold
from loupe.models.files import load_config
from loupe.reporting.page import render_page
from loupe.stages.files import CALIBRATION, MANIFEST, MODELS, PREPARED, REPORTS, RUN, VALIDATION, load_data_set
from loupe.tracking.audit import find_latest, load_audit
from loupe.tracking.environment import name_device
from loupe.tracking.logged_models import NUM_TIMED, load_model, measure_latencies
from loupe.tracking.records import DATA_TAG, find_record, save_card
from loupe.tracking.runs import MlflowClient, connect, find_run

SPLITS = ("train", "val", "calibration", "test")
MOST_LABELS = 40  # shown
FEW_IMAGES = 20  # of a label: its own figures then say little
MOST_NAMED = 10  # labels in a sentence
KINDS = {"classifier": "A classifier", "detector": "An anomaly detector"}
SCRATCH_LICENCE = "It was trained from random weights: no one else's licence bears on it."


@dataclass(frozen=True)
class Figure:
    """A test figure, with its 95% interval where it has one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class ModelCard:
    """All that the card says. `images` has the number of images of each split by label, in the order of `splits`.

    `threshold` says what a detector's stands for, in words, and is None of a classifier. `device` is what
    `latency_ms`, of one image, was measured on.
    """

    model: str
    version: str
    kind: str
    run_id: str
    trained: str
    commit: str | None
    is_clean: bool
    data: str
    layout: str
    num_set_aside: int
    data_digest: str
    splits: Sequence[str]
    images: Mapping[str, Sequence[int]]
    num_test: int
    figures: Mapping[str, Figure]
    threshold: str | None
    limits: Sequence[str]
    latency_ms: float
    num_bytes: int
    device: str
    licence: str


def attach_model_cards() -> None:
    """Write the card of each version of what was trained in this folder; what is not registered has none.

    Raises:
        DataError: if a file of the stages is missing.
        TrackingError: if the store does not hold a run.
    """
    name = load_data_set().name
    client = connect(name)
    for run_file in sorted(MODELS.glob(f"*/{RUN}")):
        record = find_record(client, find_run(client, run_file))
        if record.version is not None:
            attach_model_card(client, f"{name}-{record.task}", record.version, record.task)


def attach_model_card(client: MlflowClient, name: str, version: str, task: str) -> None:
    """Write the card of a version of what was trained in this folder: to its run, and as the version's description.

    Args:
        name: of the registered model, of which `version` is one.

    Raises:
        DataError: if a file of the stages is missing.
        TrackingError: if the store does not hold the run.
    """
    save_card(client, name, version, build_model_card(load_model_card(client, name, version, task)))


def check_card_files(task: str) -> None:
    """Refuse to go on where no card can be made of what was trained in this folder.

    Raises:
        DataError: if a file of the stages is missing.
    """
    for path in (MANIFEST, VALIDATION, PREPARED / task / "index.parquet", REPORTS / "metrics" / f"{task}.json"):
        if not path.exists():
            raise DataError(f"{path} is missing, which a model card is made from: `dvc repro` writes it")


def build_model_card(card: ModelCard) -> str:
    """The card in Markdown."""
    shown = list(card.images.items())[:MOST_LABELS]
    values = {
        "card": card,
        "shown_labels": [(escape_markdown(label), counts) for label, counts in shown],
        "num_hidden": len(card.images) - len(shown),
    }
    return render_page("model_card.md.jinja", values).strip() + "\n"


def escape_markdown(text: str) -> str:
    """Names of folders may hold what Markdown or HTML would take for their own."""
    escaped = "".join(f"\\{letter}" if letter in "\\`*_[]|#" else letter for letter in text)
    return " ".join(escaped.replace("&", "&amp;").replace("<", "&lt;").split())


def load_model_card(client: MlflowClient, name: str, version: str, task: str) -> ModelCard:
    """Gather it from the stages' files, the run and the audit."""
    check_card_files(task)
    record = find_record(client, str(client.get_model_version(name, version).run_id))
    data_set, config = load_data_set(), load_config(MODELS / task)
    index = load_table(PREPARED / task / "index.parquet")
    images = _count_images(index)
    metrics: dict[str, float] = _load_json(REPORTS / "metrics" / f"{task}.json")
    latency_ms, num_bytes = _find_speed(client, name, version, Path(data_set.source), index)
    return ModelCard(
        model=name,
        version=version,
        kind=f"{KINDS[task]}: {escape_markdown(record.model)}",
        run_id=record.run_id,
        trained=f"{record.start:%Y-%m-%d %H:%M:%S}",
        commit=record.commit,
        is_clean=record.is_clean,
        data=data_set.name,
        layout=data_set.layout,
        num_set_aside=data_set.num_quarantined,
        data_digest=record.tags.get(DATA_TAG, ""),
        splits=SPLITS,
        images=images,
        num_test=int(index["split"].eq("test").sum()),
        figures=list_figures(metrics, task),
        threshold=_describe_threshold(config) if task == "detector" else None,
        limits=describe_limits(task, config, images, load_table(MANIFEST), _load_json(VALIDATION)["findings"]),
        latency_ms=latency_ms,
        num_bytes=num_bytes,
        device=name_device(),
        licence=_describe_licence(config),
    )


def _count_images(index: pd.DataFrame) -> dict[str, list[int]]:
    counts = pd.crosstab(index["label"], index["split"]).reindex(columns=list(SPLITS), fill_value=0)
    return {
        str(label): [int(count) for count in row] for label, row in zip(counts.index, counts.to_numpy(), strict=True)
    }


def _find_speed(client: MlflowClient, name: str, version: str, source: Path, index: pd.DataFrame) -> tuple[float, int]:
    """Milliseconds an image, and bytes: as they were when the version was decided on, otherwise as they are now."""
    known = find_latest(load_audit(client, name), version)
    if known is not None and "latency_ms" in known.figures:
        return known.figures["latency_ms"], known.figures["num_bytes"]
    images = [source / path for path in index.loc[index["split"].eq("test"), "path"].head(NUM_TIMED)]
    model = load_model(f"models:/{name}/{version}")
    return measure_latencies([model], images)[0], model.num_bytes


def list_figures(metrics: Mapping[str, float], task: str) -> dict[str, Figure]:
    """The test figures by their last name, without counts and without those of single labels."""
    start = f"{task}/test/"
    figures = {name.removeprefix(start): value for name, value in metrics.items() if name.startswith(start)}
    bounds = {f"{name}_{end}" for name in figures for end in ("low", "high")}
    return {
        name: Figure(value, figures.get(f"{name}_low"), figures.get(f"{name}_high"))
        for name, value in figures.items()
        if "/" not in name and not name.startswith("num_") and name not in bounds
    }


def _describe_threshold(config: Mapping[str, Any]) -> str:
    scores = load_table(MODELS / "detector" / CALIBRATION)["anomaly_score"].to_numpy()
    threshold = explain_threshold(scores, config["false_alarm_rate"])
    return f"An image is flagged where its score is above {threshold.value:.6g}. {threshold.describe()}"


def describe_limits(
    task: str,
    config: Mapping[str, Any],
    images: Mapping[str, Sequence[int]],
    manifest: pd.DataFrame,
    findings: Sequence[Mapping[str, Any]],
) -> list[str]:
    """What not to expect of it, in sentences that follow from its data.

    Args:
        config: of the model, with its geometry.
        images: the number of images of each of SPLITS, by label.
        manifest: with `width` and `height` in pixels.
        findings: those of reports/validation.json.
    """
    limits = [_describe_size(Geometry(**config["geometry"]), manifest)]
    if task == "classifier":
        limits.append("It knows the labels above alone, and gives one of them to any image, whatever it shows.")
    else:
        normal = escape_markdown(config["normal_label"])
        limits.append(f"It was fitted to images of {normal} alone; kinds of defect that are not above were not tested.")
    limits.append(_describe_unseen(sum(counts[SPLITS.index("test")] for counts in images.values())))
    limits += [_describe_few(images, purpose) for purpose in (["train", "test"] if task == "classifier" else ["test"])]
    for finding in findings:
        if finding["num_failing"]:
            limits.append(f"The data did not satisfy: {finding['sentence']} ({finding['num_failing']} files).")
    return [limit for limit in limits if limit]


def _describe_size(geometry: Geometry, manifest: pd.DataFrame) -> str:
    ends = [
        " x ".join(str(int(getattr(manifest[side], end)())) for side in ("width", "height")) for end in ("min", "max")
    ]
    sizes = f"of {ends[0]} pixels" if ends[0] == ends[1] else f"of {ends[0]} to {ends[1]} pixels"
    colours = "in grey" if geometry.channels == 1 else "in colour"
    seen = f"{geometry.input_width} x {geometry.input_height}"
    return (
        f"It learnt from images {sizes}, {colours}, seen at {seen} (width x height); others are brought to that, and "
        "what is much larger or smaller than those is shown to it as it never saw it."
    )


def _describe_unseen(num_test: int) -> str:
    """How often may happen what never did: the exact upper bound for 0 of n (Clopper and Pearson, 1934), one-sided."""
    if not num_test:
        return "It was not tested on any image."
    return (
        f"A kind of error that none of its {num_test:,} test images showed may still occur in up to "
        f"{1 - 0.05 ** (1 / num_test):.2%} of new ones (95% confidence)."
    )


def _describe_few(images: Mapping[str, Sequence[int]], split: str) -> str:
    """Empty where there are enough of each label."""
    at = SPLITS.index(split)
    few = [
        f"{escape_markdown(label)} ({counts[at]})" for label, counts in images.items() if 0 < counts[at] < FEW_IMAGES
    ]
    if not few:
        return ""
    more = f" and {len(few) - MOST_NAMED} more" if len(few) > MOST_NAMED else ""
    said = "were few to learn from" if split == "train" else "were few to test on: what was found of them may be chance"
    return f"Images of {', '.join(few[:MOST_NAMED])}{more} {said}."


def _load_json(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def _describe_licence(config: Mapping[str, Any]) -> str:
    """Of the weights that training began with."""
    weights = config.get("weights")
    if weights in (None, "none", "random"):
        return SCRATCH_LICENCE
    return f"Training started from these weights, and their licence holds: {escape_markdown(weights)}."
