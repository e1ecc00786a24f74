"""Registering what was trained, and deciding who is champion. Outside DVC: a cache must neither skip nor replay it."""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from loupe.config import TASK_NAMES, Params, PromoteTask
from loupe.data.manifest import compute_data_digest, load_table
from loupe.data.split import load_tasks
from loupe.errors import DataError, TrackingError
from loupe.evaluation.agreement import Agreement
from loupe.evaluation.promotion import Decision, HoldOut, Measured, decide_promotion
from loupe.model_card import check_card_files
from loupe.stages.entry import save_json
from loupe.stages.files import LISTING, MODELS, PREPARED, PROMOTION, REPORTS, RUN, SEEN, SKIPPED, TASKS, load_data_set
from loupe.stages.operating import check_reason, check_task, open_registry
from loupe.tracking import champions, logged_models, registry
from loupe.tracking.audit import (
    KEPT,
    OVERRIDDEN,
    ROLLED_BACK,
    UNDECIDED,
    Entry,
    find_latest,
    load_audit,
)
from loupe.tracking.logged_models import LoadedModel
from loupe.tracking.records import find_record
from loupe.tracking.runs import find_run

_Recalled = tuple[str, str, dict[str, Any]]  # a word of the audit, the reason, the figures

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What became of one trained model.

    `version` is None where nothing was registered, and `champion_version` where nobody is champion. `decision` is a
    word of the audit: promoted, kept, undecided, overridden, and so on.
    """

    model: str
    version: str | None
    run_id: str
    champion_version: str | None
    decision: str
    reason: str
    figures: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Flat: each figure under `promotion/<figure>`."""
        values = asdict(self)
        return values | {f"promotion/{name}": value for name, value in values.pop("figures").items()}


@dataclass(frozen=True)
class _Trained:
    """What training left of one task, and the registered model that it belongs to."""

    task: str
    client: registry.MlflowClient
    name: str
    run_id: str
    model_uri: str


def promote(params: Params, dry_run: bool = False) -> None:
    """Register each trained model as challenger, decide whether it becomes champion, and write reports/promotion.json.

    Args:
        dry_run: decide and say so, and neither register, move nor write anything.

    Raises:
        DataError: if nothing was trained, or what was trained was not tested or exported; then nothing is registered.
        TrackingError: if the MLflow store does not hold the run of a model.
    """
    found = [_find_trained(task) for task in TASK_NAMES if not (MODELS / task / SKIPPED).exists()]
    outcomes = {trained.task: (_try if dry_run else _promote_task)(trained, params) for trained in found}
    if not dry_run:
        save_json({task: outcome.to_json() for task, outcome in outcomes.items()}, PROMOTION)
    for outcome in outcomes.values():
        _tell(outcome, dry_run)


def _tell(outcome: Outcome, dry_run: bool) -> None:
    would_be = (
        "is champion already"
        if outcome.version and outcome.version == outcome.champion_version
        else f"would be {outcome.decision}"
    )
    log.info(
        "%s %s: %s: %s; the champion %s %s",
        outcome.model,
        f"version {outcome.version}" if outcome.version else f"of run {outcome.run_id[:8]}",
        would_be if dry_run else outcome.decision,
        outcome.reason,
        "stays" if dry_run else "is",
        f"version {outcome.champion_version}" if outcome.champion_version else "nobody yet",
    )


def override(task: str, reason: str) -> None:
    """Make what was trained champion because a person says so; floors and champion are not asked.

    Raises:
        ConfigError: if there is no such task, or no reason.
        DataError: if none was trained, or it was not tested or exported.
        TrackingError: if it is champion already, or its export disagrees with it, which no one can override.
    """
    check_reason(reason)
    check_task(task)
    trained = _find_trained(task)
    flaw = _find_flaw(task)
    if flaw is not None:
        raise TrackingError(f"{trained.name} is not promoted by override either, as {flaw}")
    version = str(_register(trained).version)
    champion = _find_champion(trained)
    if champion == version:
        raise TrackingError(f"version {version} of {trained.name} is champion already")
    digest = compute_data_digest(_load_hold_out(task).assign(split="test"))
    entry = Entry(OVERRIDDEN, version, champion, version, champions.name_user(), reason, digest)
    champions.record(trained.client, trained.name, entry)
    log.info("%s: version %s is champion, as %s says: %s", trained.name, version, entry.who, reason)


def _find_trained(task: str) -> _Trained:
    client, data_set = open_registry()
    if not (MODELS / task / RUN).exists():
        raise DataError(f"no {task} was trained here: `loupe run` trains what the data allows")
    run_id = find_run(client, MODELS / task / RUN)
    known = client.get_experiment(client.get_run(run_id).info.experiment_id).name
    if known != data_set:
        raise DataError(
            f"the {task} was trained on {known}, and {LISTING} is of {data_set}: `loupe run` makes up for it"
        )
    model_uri = json.loads((MODELS / task / RUN).read_text())["model_uri"]
    _check_results(task, run_id)
    check_card_files(task)
    return _Trained(task, client, f"{data_set}-{task}", run_id, model_uri)


def _check_results(task: str, run_id: str) -> None:
    """Refuse the figures of another training, which `dvc repro` of some stages alone leaves in place."""
    for folder, name, done in (
        (REPORTS / task, task, "tested"),
        (MODELS / "exported" / task, f"{task}_export", "exported"),
    ):
        known, metrics = folder / RUN, _locate_metrics(name)
        if not (known.exists() and metrics.exists()) or json.loads(known.read_text())["run_id"] != run_id:
            raise DataError(
                f"the {task} was trained and not {done} since, as {metrics} is not of its run: "
                "`dvc repro` makes up for it"
            )


def _locate_metrics(name: str) -> Path:
    return REPORTS / "metrics" / f"{name}.json"


def _register(trained: _Trained) -> registry.ModelVersion:
    """The version of what was trained, after what another process may have left undone."""
    version = registry.register_version(trained.client, trained.name, trained.run_id, trained.model_uri)
    champions.settle(trained.client, trained.name)
    return version


def _find_champion(trained: _Trained) -> str | None:
    champion = registry.find_champion(trained.client, trained.name)
    return str(champion.version) if champion else None


def _promote_task(trained: _Trained, params: Params) -> Outcome:
    version = str(_register(trained).version)
    champion = _find_champion(trained)
    rules: PromoteTask = getattr(params.promote, trained.task)
    hold_out, flaw = _load_hold_out(trained.task), _find_flaw(trained.task)
    question = _compute_question(rules, hold_out, champion, flaw)
    known = _recall(trained, version, champion, question)
    decision: str
    if known is not None:
        decision, reason, figures = known
    else:
        found = _decide(trained, champion, hold_out, rules, params.seed, flaw)
        decision, reason, figures = found.choice, found.reason, found.figures
        digest = compute_data_digest(hold_out.assign(split="test"))
        after = version if decision == "promoted" else champion
        entry = Entry(decision, version, champion, after, champions.name_user(), reason, digest, question, figures)
        try:
            champions.record(trained.client, trained.name, entry)
        except champions.OvertakenError as error:
            decision, reason = UNDECIDED, str(error)
    return Outcome(trained.name, version, trained.run_id, _find_champion(trained), decision, reason, figures)


def _recall(trained: _Trained, version: str, champion: str | None, question: str) -> _Recalled | None:
    """What was decided on a version before and still holds; None where it is to be decided."""
    known = find_latest(load_audit(trained.client, trained.name), version)
    if known is None:
        return None
    if champion != version and known.action == ROLLED_BACK:
        reason = f"{known.who} rolled it back ({known.why}), and only `loupe promote --override` undoes that"
        return KEPT, reason, known.figures
    if champion != version and (known.question != question or (champion is None and known.is_begun)):
        return None
    return known.action, known.why, known.figures


def _try(trained: _Trained, params: Params) -> Outcome:
    """What would become of a model, without a trace of the question."""
    champion, hold_out, flaw = _find_champion(trained), _load_hold_out(trained.task), _find_flaw(trained.task)
    rules: PromoteTask = getattr(params.promote, trained.task)
    version = find_record(trained.client, trained.run_id).version
    question = _compute_question(rules, hold_out, champion, flaw)
    known = None if version is None else _recall(trained, version, champion, question)
    if known is None:
        found = _decide(trained, champion, hold_out, rules, params.seed, flaw)
        known = found.choice, found.reason, found.figures
    return Outcome(trained.name, version, trained.run_id, champion, *known)


def _decide(
    trained: _Trained, champion: str | None, hold_out: pd.DataFrame, rules: PromoteTask, seed: int, flaw: str | None
) -> Decision:
    """Load the challenger and the champion, if there is one, and test both on the same images."""
    uris = [trained.model_uri, *([f"models:/{trained.name}/{champion}"] if champion else [])]
    models = [logged_models.load_model(uri) for uri in uris]
    files = list(hold_out["file"])
    latencies = logged_models.measure_latencies(models, files)
    measured = [
        Measured(_answer(trained.task, model, hold_out), latency, model.num_bytes, _find_seen(model, hold_out))
        for model, latency in zip(models, latencies, strict=True)
    ]
    normal_label = load_tasks(TASKS).normal_label if trained.task == "detector" else None
    judged = HoldOut(hold_out["label"].to_numpy(str), normal_label)
    return decide_promotion(judged, measured[0], measured[1] if champion else None, rules, seed, flaw)


def _answer(task: str, model: LoadedModel, hold_out: pd.DataFrame) -> np.ndarray:
    """Scores of a detector; of a classifier, where it is right. Labels that it never learnt are its errors.

    Raises:
        DataError: if a test image has become unreadable since it was prepared.
    """
    predictions = model.predict(list(hold_out["file"]))
    problems = predictions["problem"].dropna()
    if len(problems):
        file, problem = hold_out["file"][problems.index[0]], problems.iloc[0]
        raise DataError(f"{file} is a test image and can no longer be read ({problem}): run the stages again")
    if task == "classifier":
        return (predictions["predicted"] == hold_out["label"]).to_numpy(np.float64)
    return predictions["anomaly_score"].to_numpy(np.float64)


def _find_seen(model: LoadedModel, hold_out: pd.DataFrame) -> np.ndarray:
    """Which of the images had a part in its training: since then, they may have been divided anew."""
    known = next(model.folder.glob(f"*/{SEEN}"), None)
    if known is None:
        log.warning("a model trained by an earlier version does not say what it learnt from: all images are compared")
        return np.zeros(len(hold_out), bool)
    return hold_out["image_id"].isin(load_table(known)["image_id"]).to_numpy()


def _find_flaw(task: str) -> str | None:
    """What the stage that exported the model found wrong, in words; None where it agrees."""
    values = json.loads(_locate_metrics(f"{task}_export").read_text())
    agreement = Agreement(**{field.name: values[f"{task}/export/{field.name}"] for field in fields(Agreement)})
    if agreement.agrees:
        return None
    return f"the exported model disagrees with the trained one: {agreement.describe()}"


def _load_hold_out(task: str) -> pd.DataFrame:
    """image_id, label and file of the test images, the same for challenger and champion."""
    root = Path(load_data_set().source)
    index = load_table(PREPARED / task / "index.parquet")
    rows = index[index["split"].eq("test")].reset_index(drop=True)
    return rows[["image_id", "label"]].assign(file=[root / path for path in rows["path"]])


def _compute_question(rules: PromoteTask, hold_out: pd.DataFrame, champion: str | None, flaw: str | None) -> str:
    """A digest of all that a decision rests on beside the challenger, so that the same is not decided twice."""
    parts = [str(champion), rules.model_dump_json(), *hold_out["image_id"], *hold_out["label"]]
    parts += [flaw] if flaw else []
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
