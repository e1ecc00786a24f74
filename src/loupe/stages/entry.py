"""What every stage's process does around its work: read params, log, and turn an error into one sentence."""

import json
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loupe.config import Params, load_params
from loupe.errors import LoupeError

TRACEBACK_VARIABLE = "LOUPE_TRACEBACK"


def run_stage(stage: Callable[[Params], None]) -> None:
    """Run a stage in the current folder, and exit with 1 after one sentence if it can't be done."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    for chatty in ("pytorch_lightning", "lightning_fabric", "great_expectations", "mlflow", "alembic", "matplotlib"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # A CPU's cores train, and none is left for loading; the others are advice to the libraries' own makers.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*in eval mode at the start of training.*")  # a frozen backbone is meant to be
    warnings.filterwarnings("ignore", category=UserWarning, module="mlflow")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    with ending_in_a_sentence():
        stage(load_params())


@contextmanager
def ending_in_a_sentence() -> Iterator[None]:
    """Exit with 1 after one sentence where something can't be done, or the system refuses a file.

    An interruption is one sentence too, and exits with 130. What then ends with the process, such as Prefect's server,
    takes its time: a further interruption is not heard.

    With LOUPE_TRACEBACK=1 in the environment the traceback is shown as well.
    """
    try:
        yield
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, lambda *_: None)
        sys.stdout.flush()
        sys.stderr.write("interrupted: what has ended is kept, and the same command goes on from there\n")
        sys.exit(128 + signal.SIGINT)
    except (LoupeError, OSError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        sys.stdout.flush()
        sys.exit(f"error: {_describe(error)}")


def _describe(error: LoupeError | OSError) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def end_with_parent() -> None:
    """A stage whose parent was killed would go on computing for nobody."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def save_json(values: Mapping[str, Any], path: Path) -> None:
    """Write a JSON file whole: a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(values, indent=2, default=str) + "\n", encoding="utf-8")
    unfinished.replace(path)
