"""What people do with champions: look back, roll back, and forget what is no longer needed."""

import logging

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loupe.config import TASK_NAMES
from loupe.errors import ConfigError
from loupe.stages.files import MODELS, SKIPPED
from loupe.stages.operating import check_reason, check_task, open_registry
from loupe.tracking import champions, registry
from loupe.tracking.audit import DONE, UNDONE, Entry, load_audit, pair_with_ends

log = logging.getLogger(__name__)


def roll_back(task: str | None, reason: str) -> None:
    """Put the previous champion of a task back; without a task, of the only one that has a champion.

    Raises:
        ConfigError: if there is no such task, no reason, or more than one task to choose from.
        TrackingError: if there is no earlier champion.
    """
    check_reason(reason)
    if task is not None:
        check_task(task)
    client, data_set = open_registry()
    if task is None:
        known = [one for one in TASK_NAMES if registry.find_champion(client, f"{data_set}-{one}") is not None]
        if len(known) != 1:
            raise ConfigError(f"say which to roll back: {' or '.join(known or TASK_NAMES)}")
        task = known[0]
    entry = champions.roll_back(client, f"{data_set}-{task}", champions.name_user(), reason)
    log.info(
        "%s-%s: version %s is champion again, and version %s was; %s says: %s",
        *(data_set, task, entry.champion_to, entry.champion_from, entry.who, reason),
    )


def forget(name: str, version: str, reason: str) -> None:
    """Delete a version that no alias names. `name` is a task or a registered model."""
    check_reason(reason)
    client, data_set = open_registry()
    name = f"{data_set}-{name}" if name in TASK_NAMES else name
    champions.delete_version(client, name, version, champions.name_user(), reason)
    log.info("version %s of %s is deleted; its run stays", version, name)


def show_history(name: str | None) -> None:
    """Print the audit of a task or of a registered model; without a name, of each task of the present data."""
    client, data_set = open_registry()
    names = [f"{data_set}-{task}" for task in TASK_NAMES if not (MODELS / task / SKIPPED).exists()]
    if name is not None:
        names = [f"{data_set}-{name}" if name in TASK_NAMES else name]
    for one in names:
        Console(highlight=False).print(build_history(one, load_audit(client, one)))


def build_history(name: str, entries: list[Entry]) -> Table:
    """A row an entry, the latest last; the entry that ended a move stands in the row of the move."""
    table = Table(title=escape(f"The audit of {name}"), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("", "when (UTC)", "who", "what", "champion", "data", "why"):
        table.add_column(heading, overflow="fold")
    for number, (entry, end) in enumerate(pair_with_ends(entries), 1):
        if entry.action in (DONE, UNDONE):
            continue
        is_ended = entry.is_begun and end in (DONE, UNDONE)
        state = " (undone)" if end == UNDONE else " (unfinished)" if entry.is_begun and not is_ended else ""
        table.add_row(
            f"{number}–{number + 1}" if is_ended else str(number),
            entry.when.removesuffix("+00:00").replace("T", " "),
            escape(entry.who),
            f"{entry.action}{f' {entry.version}' if entry.version else ''}{state}",
            entry.champion_to or "nobody"
            if entry.champion_from == entry.champion_to
            else f"{entry.champion_from or 'nobody'} → {entry.champion_to or 'nobody'}",
            entry.data[:8],
            escape(entry.why),
        )
    return table
