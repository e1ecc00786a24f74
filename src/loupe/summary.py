"""What a run ends with: a table for the terminal, the same in Markdown, and reports/summary.json."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loupe.data.split import load_tasks
from loupe.stages.entry import save_json
from loupe.stages.files import PROMOTION, REPORTS, SUMMARY, TASKS, load_data_set

FIGURES = {
    "classifier": ("accuracy", "last_epoch_accuracy", "balanced_accuracy", "macro_f1", "log_loss"),
    "detector": (
        "image_auroc",
        "image_average_precision",
        "pixel_auroc",
        "aupro",
        "f1",
        "false_alarm_rate",
        "miss_rate",
    ),
}
WHERE_TO_LOOK = (
    "data: reports/data.html · classifier: reports/classifier.html · detector: reports/detector.html · "
    "figures: reports/summary.json · runs, models, flows: make ui"
)


def write_summary() -> dict[str, Any]:
    """Gather the figures of the last run under flat names, and write reports/summary.json."""
    tasks, promotion = load_tasks(TASKS), _load_json(PROMOTION)
    summary: dict[str, Any] = {f"data/{key}": value for key, value in vars(load_data_set()).items()}
    for task, reason in (("classifier", tasks.no_classifier_because), ("detector", tasks.no_detector_because)):
        if reason:
            summary[f"{task}/not_trained_because"] = reason
        else:
            for path in sorted((REPORTS / "metrics").glob(f"{task}*.json")):
                summary |= _load_json(path)
            summary |= {f"{task}/{key}": value for key, value in promotion[task].items()}
    save_json(summary, SUMMARY)
    return summary


def _load_json(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def describe_task(summary: dict[str, Any], task: str) -> dict[str, str]:
    """What a person wants to know of one kind of model, by subject."""
    if reason := summary.get(f"{task}/not_trained_because"):
        return {"trained": f"no: {reason}"}
    champion = summary[f"{task}/champion_version"]
    version = summary[f"{task}/version"]
    images = f"{summary[f'{task}/train/num_images']} images, tested on {summary[f'{task}/test/num_images']}"
    return {
        "trained": f"on {images}",
        "figures": "\n".join(
            _describe_figure(summary, f"{task}/test/{name}")
            for name in FIGURES[task]
            if f"{task}/test/{name}" in summary
        ),
        "champion": "nobody yet" if champion is None else f"version {champion} of {summary[f'{task}/model']}",
        "because": f"version {version}: {summary[f'{task}/reason']}",
        "pictures": f"reports/{task}/",
    }


def _describe_figure(summary: dict[str, Any], name: str) -> str:
    """The last part of its name, its value, and its 95% interval where it has one."""
    figure = f"{name.rpartition('/')[2]} {summary[name]:.4f}"
    if f"{name}_low" not in summary:
        return figure
    return f"{figure} ({summary[f'{name}_low']:.4f} to {summary[f'{name}_high']:.4f})"


def describe_data(summary: dict[str, Any]) -> str:
    """The data set in one line."""
    return (
        f"{summary['data/name']}: {summary['data/num_images']} images in the layout {summary['data/layout']}, "
        f"{summary['data/num_quarantined']} files set aside"
    )


def print_summary(summary: dict[str, Any]) -> None:
    """The table that a person sees last."""
    table = Table(title=escape(describe_data(summary)), caption=WHERE_TO_LOOK, show_lines=True)
    table.add_column("")
    described = [describe_task(summary, task) for task in FIGURES]
    for task in FIGURES:
        table.add_column(task, overflow="fold")
    for subject in dict.fromkeys(subject for one in described for subject in one):
        table.add_row(subject, *(escape(one.get(subject, "")) for one in described))
    Console().print(table)


def format_markdown(summary: dict[str, Any]) -> str:
    """The same for a page."""
    lines = [describe_data(summary)]
    for task in FIGURES:
        lines += [f"\n## {task}\n"]
        lines += [
            f"- **{subject}**: {', '.join(text.splitlines())}" for subject, text in describe_task(summary, task).items()
        ]
    return "\n".join([*lines, f"\n{WHERE_TO_LOOK}"])
