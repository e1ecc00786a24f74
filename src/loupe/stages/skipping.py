"""What the stages of a task leave where the images don't allow it: DVC's outs are there all the same."""

import json
import logging

from loupe.reporting.page import render_page, save_page
from loupe.stages.entry import save_json
from loupe.stages.files import MODELS, REPORTS, SKIPPED, TASKS, load_data_set

log = logging.getLogger(__name__)


def skip(verb: str, task: str) -> bool:
    """Say why not, if the images don't allow the task, and tell whether it is so.

    Args:
        verb: `train`, `evaluate` or `export`.
        task: `classifier` or `detector`.
    """
    reason = _find_reason(verb, task)
    if reason is None:
        return False
    log.info("no %s: %s", task, reason)
    if verb == "train":
        save_json({"reason": reason}, MODELS / task / SKIPPED)
    elif verb == "evaluate":
        _leave_page(task, reason)
    else:
        (MODELS / "exported" / task).mkdir(parents=True, exist_ok=True)
        save_json({}, REPORTS / "metrics" / f"{task}_export.json")
    return True


def _find_reason(verb: str, task: str) -> str | None:
    """What was found when the images were divided; after the training, what that has left."""
    if verb == "train":
        reason: str | None = json.loads(TASKS.read_text(encoding="utf-8"))[f"no_{task}_because"]
        return reason
    path = MODELS / task / SKIPPED
    return str(json.loads(path.read_text(encoding="utf-8"))["reason"]) if path.exists() else None


def _leave_page(task: str, reason: str) -> None:
    (REPORTS / task).mkdir(parents=True, exist_ok=True)
    save_json({}, REPORTS / "metrics" / f"{task}.json")
    values = {"name": load_data_set().name, "task": task, "reason": reason}
    save_page(render_page("skipped.html.jinja", values), REPORTS / f"{task}.html")
