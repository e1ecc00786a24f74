"""What commands on registered models ask first: whether there is a data set, such a task, and a reason."""

from loupe.config import TASK_NAMES
from loupe.errors import ConfigError, DataError
from loupe.stages.files import LISTING, load_data_set
from loupe.tracking.runs import MlflowClient, connect


def open_registry() -> tuple[MlflowClient, str]:
    """The store, and the name of the present data set, with which its models' names begin.

    Raises:
        DataError: if nothing was ingested.
    """
    if not LISTING.exists():
        raise DataError(f"{LISTING} does not exist: `loupe run` makes it, in the project's folder")
    name = load_data_set().name
    return connect(name), name


def check_reason(reason: str) -> None:
    """Refuse an empty one: it is what the audit will say."""
    if not reason.strip():
        raise ConfigError("--reason must say why, in a few words: it is kept in the audit")


def check_task(task: str) -> None:
    """Refuse one that does not exist."""
    if task not in TASK_NAMES:
        raise ConfigError(f"the task must be {' or '.join(TASK_NAMES)}, got {task!r}")
