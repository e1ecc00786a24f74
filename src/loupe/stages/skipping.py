"""What the stages of a task leave where the images don't allow it: DVC's outs are there all the same."""

import json
import logging

from loupe.config import Params
from loupe.reporting.page import render_page, save_page
from loupe.stages.entry import save_json
from loupe.stages.files import MODELS, REPORTS, SKIPPED, TASKS, load_data_set

log = logging.getLogger(__name__)


def find_reason(verb: str, task: str) -> str | None:
    """Why the images don't allow the task, or None: as they were divided, and after the training, what that has left.

    Args:
        verb: `train`, `evaluate` or `export`.
        task: `classifier` or `detector`.
    """
    if verb == "train":
        reason: str | None = json.loads(TASKS.read_text(encoding="utf-8"))[f"no_{task}_because"]
        return reason
    path = MODELS / task / SKIPPED
    return str(json.loads(path.read_text(encoding="utf-8"))["reason"]) if path.exists() else None


def skip(verb: str, task: str, reason: str, params: Params) -> None:
    """Leave the outs of that stage; it takes `params` as every stage does."""
    log.info("no %s: %s", task, reason)
    if verb == "train":
        save_json({"reason": reason}, MODELS / task / SKIPPED)
    elif verb == "evaluate":
        _leave_page(task, reason)
    else:
        (MODELS / "exported" / task).mkdir(parents=True, exist_ok=True)
        save_json({}, REPORTS / "metrics" / f"{task}_export.json")


def _leave_page(task: str, reason: str) -> None:
    (REPORTS / task).mkdir(parents=True, exist_ok=True)
    save_json({}, REPORTS / "metrics" / f"{task}.json")
    values = {"name": load_data_set().name, "task": task, "reason": reason}
    save_page(render_page("skipped.html.jinja", values), REPORTS / f"{task}.html")
