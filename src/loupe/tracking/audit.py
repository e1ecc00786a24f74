"""The audit of a registered model: what was decided and moved, by whom, on which data and why. Nothing is rewritten.

MLflow knows no transactions, and its tags and aliases may be overwritten by anyone; but no value of a run's parameter
is ever replaced. So an audit is a run of its own, named by the tag `audit_run` of the registered model, and its entries
are the parameters 000001, 000002 and so on. Of two processes that write the same number, one is refused, on a file and
on a shared server alike.
"""

import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from loupe.errors import TrackingError

AUDIT_TAG = "audit_run"
LONGEST = 6000  # characters of a parameter; MLflow cuts what is longer without a word
PROMOTED, KEPT, UNDECIDED, OVERRIDDEN = "promoted", "kept", "undecided", "overridden"
ROLLED_BACK, FORGOTTEN, MOVED_OUTSIDE = "rolled back", "forgotten", "moved outside"
DONE, UNDONE = "done", "undone"
MOVES = (PROMOTED, OVERRIDDEN, ROLLED_BACK)  # which are begun by one entry and ended by the next, DONE or UNDONE


def _tell_time() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Entry:
    """One line of an audit. Times are UTC.

    `version` is what it is about: the challenger, the champion that was taken back, the one that was forgotten.
    `champion_from` and `champion_to` are versions, None for nobody; they are equal where nothing moved.
    `data` is a digest of the images that were decided on, and `question` of all that the decision rests on.
    `mark` tells two entries of the same words apart.
    """

    action: str
    version: str | None
    champion_from: str | None
    champion_to: str | None
    who: str
    why: str
    data: str = ""
    question: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    when: str = field(default_factory=_tell_time)
    mark: str = field(default_factory=lambda: secrets.token_hex(4))

    @property
    def is_begun(self) -> bool:
        """Whether another entry must end it."""
        return self.action in MOVES


def create_model(client: MlflowClient, name: str, experiment_id: str) -> None:
    """Make the registered model and its audit, in one step, if nobody has; one that has no audit gets one.

    Args:
        experiment_id: where the run that holds the audit is made.
    """
    try:
        known = client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        known = None
    if known is not None and AUDIT_TAG in known.tags:
        return
    run_id = client.create_run(experiment_id, run_name=f"audit of {name}", tags={"audit_of": name}).info.run_id
    client.set_terminated(run_id)
    if known is not None:
        client.set_registered_model_tag(name, AUDIT_TAG, run_id)
        return
    try:
        about = f"Who was champion, when and why: the parameters of run {run_id}, or `loupe history {name}`."
        client.create_registered_model(name, tags={AUDIT_TAG: run_id}, description=about)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        client.delete_run(run_id)  # another process was first, and its audit is the one


def load_audit(client: MlflowClient, name: str) -> list[Entry]:
    """All entries, from the first; none where the model has no audit yet.

    Raises:
        TrackingError: if the store has no such model, or the audit is not whole.
    """
    run_id = _find_audit(client, name)
    if run_id is None:
        return []
    try:
        params = client.get_run(run_id).data.params
    except MlflowException as error:
        raise TrackingError(f"the audit of {name} is gone: MLflow does not hold its run {run_id}") from error
    expected = [_name(number) for number in range(1, len(params) + 1)]
    if sorted(params) != expected:
        raise TrackingError(f"the audit of {name} has gaps: run {run_id} holds {', '.join(sorted(params))}")
    return [Entry(**json.loads(params[key])) for key in expected]


def append_entry(client: MlflowClient, name: str, entry: Entry, number: int) -> bool:
    """Write an entry under its number; False where another process has written that number first.

    Args:
        number: one more than there are entries.

    Raises:
        TrackingError: if the entry is longer than MLflow keeps, or its run was deleted.
    """
    text = json.dumps(asdict(entry), ensure_ascii=False)
    if len(text) > LONGEST:
        raise TrackingError(f"an entry of the audit has at most {LONGEST} characters, got {len(text)}: say it shorter")
    run_id = _find_audit(client, name)
    assert run_id is not None  # made with the model
    try:
        client.log_param(run_id, _name(number), text)
    except MlflowException as error:
        run = client.get_run(run_id)
        if _name(number) in run.data.params:
            return False
        raise TrackingError(f"the audit of {name} takes no entry, its run {run_id}: {error.message}") from error
    return True


def _find_audit(client: MlflowClient, name: str) -> str | None:
    try:
        run_id: str | None = client.get_registered_model(name).tags.get(AUDIT_TAG)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise TrackingError(f"MLflow has no registered model {name!r}: `loupe promote` makes it") from error
    return run_id


def _name(number: int) -> str:
    return f"{number:06d}"


def compute_champions(entries: Sequence[Entry]) -> list[str]:
    """The versions that were champion, from the first to the present one, without those that were taken back."""
    champions: list[str] = []
    for entry in list_moves(entries):
        version = entry.champion_to
        if entry.action == ROLLED_BACK and version in champions:
            del champions[len(champions) - champions[::-1].index(version) :]
        elif version is not None and champions[-1:] != [version]:
            champions.append(version)
    return champions


def list_moves(entries: Sequence[Entry]) -> list[Entry]:
    """Those that have another champion after them, without those that were undone."""
    return [
        entry
        for entry, end in pair_with_ends(entries)
        if entry.action == MOVED_OUTSIDE or (entry.is_begun and end != UNDONE)
    ]


def pair_with_ends(entries: Sequence[Entry]) -> list[tuple[Entry, str]]:
    """Each entry, and what the next one says: DONE or UNDONE where it was begun and ended; of the last, nothing."""
    return [(entry, entries[i + 1].action if i + 1 < len(entries) else "") for i, entry in enumerate(entries)]


def find_latest(entries: Sequence[Entry], version: str) -> Entry | None:
    """The latest entry about a version that says what became of it."""
    about = [entry for entry in entries if entry.version == version and entry.action not in (DONE, UNDONE)]
    return about[-1] if about else None
