"""Moving the aliases `champion` and `previous-champion`: one process at a time, and never half of it.

A move is first written into the audit, then made, then written as done; it is the same however often it is made. What a
process that died has begun, the next one ends. Beside a file of SQLite a lock keeps processes apart; on a shared
server the audit does, as it takes each number once.
"""

import getpass
import logging
import os
from collections.abc import Sequence

from mlflow import MlflowClient

from loupe.errors import TrackingError
from loupe.tracking.audit import (
    DONE,
    FORGOTTEN,
    MOVED_OUTSIDE,
    ROLLED_BACK,
    UNDONE,
    Entry,
    append_entry,
    compute_champions,
    list_moves,
    load_audit,
)
from loupe.tracking.registry import CHAMPION, PREVIOUS_CHAMPION, find_champion, find_version, lock_registry

DECISION_TAG, REASON_TAG = "promotion", "promotion_reason"

log = logging.getLogger(__name__)


class OvertakenError(TrackingError):
    """Somebody else moved the champion between a decision and its record; nothing was moved for this decision."""


def name_user() -> str:
    """Who runs this process; its number where the system has no name for it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"user {os.getuid()}"


def settle(client: MlflowClient, name: str) -> list[Entry]:
    """End what a process that died has begun, write down what was moved outside, and give the audit as it is then."""
    with lock_registry():
        return _settle(client, name)


def record(client: MlflowClient, name: str, entry: Entry) -> None:
    """Write a decision, and move the champion if it says so.

    Raises:
        OvertakenError: if the champion is no longer `entry.champion_from`; nothing is written or moved then.
    """
    with lock_registry():
        _record(client, name, entry)


def roll_back(client: MlflowClient, name: str, who: str, why: str) -> Entry:
    """Put the previous champion back. The one before it is then the previous one, so that a second call goes further.

    Returns:
        The entry of the audit.

    Raises:
        TrackingError: if there is no champion, or none before it.
    """
    with lock_registry():
        entries = _settle(client, name)
        champion = _find_champion(client, name)
        if champion is None:
            raise TrackingError(f"{name} has no champion that could be taken back")
        previous = _find_previous(client, name, compute_champions(entries), champion)
        if previous is None:
            raise TrackingError(f"{name} has no earlier champion than version {champion} to go back to")
        entry = Entry(ROLLED_BACK, champion, champion, previous, who, why)
        _record(client, name, entry)
        return entry


def delete_version(client: MlflowClient, name: str, version: str, who: str, why: str) -> None:
    """Delete a version that no alias names; its run and its logged model stay.

    Raises:
        TrackingError: if there is no such version, or an alias names it.
    """
    with lock_registry():
        _settle(client, name)
        known = find_version(client, name, version)
        if known is None:
            raise TrackingError(f"{name} has no version {version}")
        if known.aliases:
            aliases = " and ".join(sorted(known.aliases))
            raise TrackingError(f"version {version} of {name} is {aliases}, and stays as long as it is")
        champion = _find_champion(client, name)
        _record(client, name, Entry(FORGOTTEN, version, champion, champion, who, why))
        client.delete_model_version(name, version)


def _record(client: MlflowClient, name: str, entry: Entry) -> None:
    entries = _settle(client, name)
    while _find_champion(client, name) == entry.champion_from:
        if append_entry(client, name, entry, len(entries) + 1):
            break
        entries = _settle(client, name)  # on a shared server another process wrote this number
    else:
        now = _find_champion(client, name)
        raise OvertakenError(
            f"while this was decided, {_say(now)} became champion; "
            "nothing was moved, and the next `loupe promote` decides anew"
        )
    if entry.is_begun:
        _end(client, name, [*entries, entry], DONE)
    if entry.version is not None:
        client.set_model_version_tag(name, entry.version, DECISION_TAG, entry.action)
        client.set_model_version_tag(name, entry.version, REASON_TAG, entry.why)


def _settle(client: MlflowClient, name: str) -> list[Entry]:
    entries = load_audit(client, name)
    if entries and entries[-1].is_begun:
        begun = entries[-1]
        assert begun.champion_to is not None  # nobody is promoted to nobody
        end = UNDONE if find_version(client, name, begun.champion_to) is None else DONE
        _end(client, name, entries, end)
        log.warning(
            "%s: version %s was being made champion by %s (%s) when that process died; it is %s now",
            name, begun.champion_to, begun.who, begun.action, end,
        )  # fmt: skip
        entries = load_audit(client, name)
    moves = list_moves(entries)
    believed, champion = moves[-1].champion_to if moves else None, _find_champion(client, name)
    if champion != believed:
        why = "the alias was moved outside of Loupe, or before there was an audit"
        found = Entry(MOVED_OUTSIDE, champion, believed, champion, "not known", why)
        append_entry(client, name, found, len(entries) + 1)
        log.warning("%s: %s is champion, where the audit has %s", name, _say(champion), _say(believed))
        return _settle(client, name)
    return entries


def _end(client: MlflowClient, name: str, entries: Sequence[Entry], end: str) -> None:
    """Make the aliases what the entries say, and write that the last of them is done, or undone."""
    last = entries[-1]
    ended = Entry(end, last.version, last.champion_from, last.champion_to, name_user(), "")
    _set_aliases(client, name, compute_champions([*entries, ended]))
    if not append_entry(client, name, ended, len(entries) + 1):
        # On a shared server another process took this one for dead, and may have gone on since.
        _set_aliases(client, name, compute_champions(load_audit(client, name)))


def _set_aliases(client: MlflowClient, name: str, champions: Sequence[str]) -> None:
    """The champion comes last: until then nothing has changed for those who are served by it."""
    champion = champions[-1] if champions and find_version(client, name, champions[-1]) else None
    previous = _find_previous(client, name, champions, champion)
    for alias, version in ((PREVIOUS_CHAMPION, previous), (CHAMPION, champion)):
        if version is None:
            client.delete_registered_model_alias(name, alias)
        else:
            client.set_registered_model_alias(name, alias, version)


def _find_previous(client: MlflowClient, name: str, champions: Sequence[str], champion: str | None) -> str | None:
    """The latest before the champion that still exists."""
    earlier = (version for version in reversed(champions) if version != champion)
    return next((version for version in earlier if find_version(client, name, version)), None)


def _find_champion(client: MlflowClient, name: str) -> str | None:
    champion = find_champion(client, name)
    return None if champion is None else str(champion.version)


def _say(version: str | None) -> str:
    return "nobody" if version is None else f"version {version}"
