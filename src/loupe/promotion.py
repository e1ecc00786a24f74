"""Registering what was trained, and deciding who is champion. Outside DVC: a cache must neither skip nor replay it."""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pandas as pd

from loupe.config import Params, PromoteTask
from loupe.data.manifest import load_table
from loupe.data.split import load_tasks
from loupe.evaluation.agreement import Agreement
from loupe.evaluation.anomaly import compute_image_auroc
from loupe.evaluation.promotion import decide_promotion
from loupe.stages.entry import save_json
from loupe.stages.files import MODELS, PREPARED, PROMOTION, REPORTS, RUN, SKIPPED, TASKS, load_data_set
from loupe.tracking import registry
from loupe.tracking.runs import connect, find_run

EXPORTED = ("classifier",)  # whose export stage leaves metrics/<task>_export.json
METRICS = {"classifier": "accuracy", "detector": "image_auroc"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What became of one trained model. `champion_version` is None where no version has ever passed the floor."""

    model: str
    version: str
    run_id: str
    champion_version: str | None
    reason: str


def promote(params: Params) -> None:
    """Register each trained model as challenger, decide whether it becomes champion, and write reports/promotion.json.

    Raises:
        TrackingError: if the MLflow store does not hold the run of a model.
    """
    outcomes = {
        task: _promote_task(task, getattr(params.promote, task))
        for task in METRICS
        if not (MODELS / task / SKIPPED).exists()
    }
    save_json({task: asdict(outcome) for task, outcome in outcomes.items()}, PROMOTION)
    for outcome in outcomes.values():
        log.info(
            "%s version %s: %s; the champion is %s",
            outcome.model,
            outcome.version,
            outcome.reason,
            f"version {outcome.champion_version}" if outcome.champion_version else "nobody yet",
        )


def _promote_task(task: str, rules: PromoteTask) -> Outcome:
    data_set = load_data_set()
    name = f"{data_set.name}-{task}"
    client = connect(data_set.name)
    run_id = find_run(client, MODELS / task / RUN)
    model_uri = json.loads((MODELS / task / RUN).read_text())["model_uri"]
    version = registry.register_version(client, name, run_id, model_uri)
    champion = registry.find_champion(client, name)
    hold_out = _load_hold_out(task, Path(data_set.source))
    flaw = _find_flaw(task)
    question = _compute_question(rules, hold_out, str(champion.version) if champion else None, flaw)
    is_champion = champion is not None and champion.version == version.version
    if not is_champion and version.tags.get(registry.QUESTION_TAG) != question:
        figure = json.loads((REPORTS / "metrics" / f"{task}.json").read_text())[f"{task}/test/{METRICS[task]}"]
        to_beat = None
        if champion is not None and flaw is None:
            to_beat = _compute_metric(task, registry.predict_with(champion, list(hold_out["file"])), hold_out)
        decision = decide_promotion(METRICS[task], figure, to_beat, rules.floor, rules.margin, flaw)
        version = registry.record_decision(client, version, decision.promoted, decision.reason, question)
        champion = registry.find_champion(client, name)
    return Outcome(
        model=name,
        version=str(version.version),
        run_id=run_id,
        champion_version=str(champion.version) if champion else None,
        reason=version.tags[registry.REASON_TAG],
    )


def _find_flaw(task: str) -> str | None:
    """What the stage that exported the model found wrong, in words; None where it agrees, or none exports it."""
    if task not in EXPORTED:
        return None
    values = json.loads((REPORTS / "metrics" / f"{task}_export.json").read_text())
    agreement = Agreement(**{field.name: values[f"{task}/export/{field.name}"] for field in fields(Agreement)})
    if agreement.agrees:
        return None
    return f"the exported model disagrees with the trained one: {agreement.describe()}"


def _load_hold_out(task: str, root: Path) -> pd.DataFrame:
    """image_id, label and file of the test images, the same for challenger and champion."""
    index = load_table(PREPARED / task / "index.parquet")
    rows = index[index["split"].eq("test")].reset_index(drop=True)
    return rows[["image_id", "label"]].assign(file=[root / path for path in rows["path"]])


def _compute_question(rules: PromoteTask, hold_out: pd.DataFrame, champion: str | None, flaw: str | None) -> str:
    """A digest of all that a decision rests on beside the challenger, so that the same is not decided twice."""
    parts = [str(champion), f"{rules.floor:g}", f"{rules.margin:g}", *hold_out["image_id"], *hold_out["label"]]
    parts += [flaw] if flaw else []
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _compute_metric(task: str, predictions: pd.DataFrame, hold_out: pd.DataFrame) -> float:
    """The main metric of a model on the hold-out; labels that it never learnt are its errors."""
    if task == "classifier":
        return float((predictions["predicted"] == hold_out["label"]).mean())
    is_anomalous = hold_out["label"].ne(str(load_tasks(TASKS).normal_label))
    return compute_image_auroc(is_anomalous.to_numpy(), predictions["anomaly_score"].to_numpy())
