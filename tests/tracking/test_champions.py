"""Moves of the champion in a real SQLite store: one after the other, at once, and by processes that are killed."""

import json
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from loupe.errors import TrackingError
from loupe.tracking.audit import (
    DONE,
    FORGOTTEN,
    KEPT,
    MOVED_OUTSIDE,
    OVERRIDDEN,
    PROMOTED,
    ROLLED_BACK,
    UNDONE,
    Entry,
    append_entry,
    load_audit,
)
from loupe.tracking.champions import OvertakenError, delete_version, record, roll_back, settle

# Moves the champion as a decision would, in a process a move that begins when all are ready, and tells how each ended.
MOVERS = """
import json, os, pathlib, signal, sys, time
from mlflow import MlflowClient
from loupe.tracking.audit import PROMOTED, Entry
from loupe.tracking.champions import OvertakenError, record
from loupe.tracking.runs import connect

def die_at(client, step):
    left = iter(range(step))
    def wrap(method):
        def call(*arguments, **options):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return method(*arguments, **options)
        return call
    for method in ("log_param", "set_registered_model_alias", "delete_registered_model_alias"):
        setattr(client, method, wrap(getattr(client, method)))

def move(number, name, before, after, step):
    client = connect("pets")
    if step is not None:
        die_at(client, step)
    pathlib.Path(f"ready-{name}-{after}").touch()
    while not all(pathlib.Path(f"ready-{one[0]}-{one[2]}").exists() for one in moves):
        time.sleep(0.01)
    try:
        record(client, name, Entry(PROMOTED, after, before, after, "ada", "it is better"))
        said = "moved"
    except OvertakenError as error:
        said = f"overtaken: {error}"
    pathlib.Path(f"said-{number}").write_text(said)

moves = json.loads(sys.argv[1])
processes = []
for number, one in enumerate(moves):
    pathlib.Path(f"said-{number}").write_text("")
    processes.append(os.fork())
    if processes[-1] == 0:
        move(number, *one)
        os._exit(0)
codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
print(json.dumps([[code, pathlib.Path(f"said-{number}").read_text()] for number, code in enumerate(codes)]))
"""


def move_at_once(store, *moves):
    """Exit code and last words of a process a move: name, version from, version to, and the step it is killed at."""
    answer = subprocess.run(
        [sys.executable, "-c", MOVERS, json.dumps(moves)],
        cwd=store.folder,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return json.loads(answer.stdout)


def promote(store, name, version, before):
    record(store.client, name, Entry(PROMOTED, version, before, version, "ada", "it is better"))


def actions(store, name):
    return [entry.action for entry in load_audit(store.client, name)]


def test_a_promotion_moves_both_aliases_and_is_in_the_audit(store):
    first, second = store.register("moved"), store.register("moved")
    promote(store, "moved", first, None)
    assert store.aliases("moved") == {"champion": first}
    promote(store, "moved", second, first)
    assert store.aliases("moved") == {"champion": second, "previous-champion": first}
    assert actions(store, "moved") == [PROMOTED, DONE, PROMOTED, DONE]
    tags = store.client.get_model_version("moved", second).tags
    assert (tags["promotion"], tags["promotion_reason"]) == ("promoted", "it is better")


def test_a_decision_that_moves_nothing_is_one_entry(store):
    first = store.register("kept")
    record(store.client, "kept", Entry(KEPT, first, None, None, "ada", "too weak"))
    assert store.aliases("kept") == {}
    assert actions(store, "kept") == [KEPT]


def test_a_decision_against_a_champion_that_has_gone_moves_nothing(store):
    first, second, third = (store.register("late") for _ in range(3))
    promote(store, "late", first, None)
    promote(store, "late", second, first)
    with pytest.raises(OvertakenError, match=f"version {second} became champion; nothing was moved"):
        promote(store, "late", third, first)
    assert store.aliases("late") == {"champion": second, "previous-champion": first}
    assert actions(store, "late") == [PROMOTED, DONE] * 2


@pytest.fixture(scope="module")
def at_once(store):
    """What became of seven processes that began at once: versions by name, and answers in the order of the moves.

    Three promote a version of `race` each, against the same champion. Four promote the third version of a name of
    their own, and are killed: before their entry, before the previous champion is moved, before the champion is, and
    before the entry that ends it.
    """
    racers = [store.register("race") for _ in range(4)]
    promote(store, "race", racers[0], None)
    moves = [("race", racers[0], other, None) for other in racers[1:]]
    versions = {"race": racers}
    for step in range(4):
        name = f"killed{step}"
        older, first, second = versions[name] = [store.register(name) for _ in range(3)]
        promote(store, name, older, None)
        promote(store, name, first, older)
        moves.append((name, first, second, step))
    return versions, move_at_once(store, *moves)


def test_of_three_processes_that_promote_at_once_one_wins_and_the_others_are_told(store, at_once):
    versions, answers = at_once
    first, *others = versions["race"]
    assert [code for code, _ in answers[:3]] == [0, 0, 0]
    said = [words for _, words in answers[:3]]
    assert said.count("moved") == 1
    winner = others[said.index("moved")]
    assert sum(f"overtaken: while this was decided, version {winner} became champion" in words for words in said) == 2
    assert store.aliases("race") == {"champion": winner, "previous-champion": first}
    assert actions(store, "race") == [PROMOTED, DONE] * 2


def test_a_process_that_was_killed_before_its_entry_has_begun_nothing(store, at_once):
    versions, answers = at_once
    older, first, _ = versions["killed0"]
    assert answers[3] == [-signal.SIGKILL, ""]
    assert [entry.action for entry in settle(store.client, "killed0")] == [PROMOTED, DONE] * 2
    assert store.aliases("killed0") == {"champion": first, "previous-champion": older}


@pytest.mark.parametrize("step", [1, 2, 3])
def test_what_a_killed_process_began_is_ended_by_the_next(store, at_once, step, caplog):
    versions, answers = at_once
    name = f"killed{step}"
    _, first, second = versions[name]
    assert answers[3 + step] == [-signal.SIGKILL, ""]
    entries = settle(store.client, name)
    assert [entry.action for entry in entries] == [PROMOTED, DONE] * 3
    assert store.aliases(name) == {"champion": second, "previous-champion": first}
    assert f"version {second} was being made champion by ada (promoted) when that process died" in caplog.text
    assert settle(store.client, name) == entries


def test_a_move_to_a_version_that_was_deleted_since_is_undone(store):
    first, second = store.register("undone"), store.register("undone")
    promote(store, "undone", first, None)
    append_entry(store.client, "undone", Entry(PROMOTED, second, first, second, "ada", "it is better"), 3)
    store.client.set_registered_model_alias("undone", "champion", second)
    store.client.delete_model_version("undone", second)
    assert [entry.action for entry in settle(store.client, "undone")[2:]] == [PROMOTED, UNDONE]
    assert store.aliases("undone") == {"champion": first}


def test_a_process_that_was_taken_for_dead_does_not_put_its_own_champion_back(store, monkeypatch):
    """On a shared server no lock keeps others away: here they go on just before the first writes that it is done."""
    first, second, third = (store.register("stalled") for _ in range(3))
    promote(store, "stalled", first, None)

    def go_on(client, name, entry, number):
        if entry.action == DONE:
            monkeypatch.undo()
            append_entry(client, name, replace(entry, mark="other"), number)
            begun = Entry(PROMOTED, third, second, third, "eve", "better still")
            append_entry(client, name, begun, number + 1)
            append_entry(client, name, Entry(DONE, third, second, third, "eve", ""), number + 2)
        return append_entry(client, name, entry, number)

    monkeypatch.setattr("loupe.tracking.champions.append_entry", go_on)
    record(store.client, "stalled", Entry(PROMOTED, second, first, second, "ada", "it is better"))
    assert store.aliases("stalled") == {"champion": third, "previous-champion": second}
    assert actions(store, "stalled") == [PROMOTED, DONE] * 3


def test_an_entry_of_another_process_in_between_does_not_lose_a_decision(store, monkeypatch):
    first, second = store.register("between"), store.register("between")
    promote(store, "between", first, None)
    kept = Entry(KEPT, second, first, first, "eve", "too weak")

    def come_first(client, name, entry, number):
        monkeypatch.undo()
        append_entry(client, name, kept, number)
        return append_entry(client, name, entry, number)

    monkeypatch.setattr("loupe.tracking.champions.append_entry", come_first)
    promote(store, "between", second, first)
    assert actions(store, "between") == [PROMOTED, DONE, KEPT, PROMOTED, DONE]
    assert store.aliases("between")["champion"] == second


def test_a_champion_that_was_moved_outside_is_taken_down_and_kept(store, caplog):
    first, second = store.register("outside"), store.register("outside")
    promote(store, "outside", first, None)
    store.client.set_registered_model_alias("outside", "champion", second)
    found = settle(store.client, "outside")[-1]
    assert (found.action, found.champion_from, found.champion_to) == (MOVED_OUTSIDE, first, second)
    assert f"outside: version {second} is champion, where the audit has version {first}" in caplog.text
    roll_back(store.client, "outside", "ada", "nobody said why")
    assert store.aliases("outside")["champion"] == first


def test_a_rollback_puts_the_previous_champion_back_and_a_second_one_goes_further(store):
    versions = [store.register("back") for _ in range(3)]
    for version, before in zip(versions, [None, *versions], strict=False):
        promote(store, "back", version, before)
    first, second, third = versions
    entry = roll_back(store.client, "back", "ada", "it flags every tile")
    assert (entry.champion_from, entry.champion_to) == (third, second)
    assert store.aliases("back") == {"champion": second, "previous-champion": first}
    roll_back(store.client, "back", "ada", "that one too")
    assert store.aliases("back") == {"champion": first}
    with pytest.raises(TrackingError, match=f"back has no earlier champion than version {first} to go back to"):
        roll_back(store.client, "back", "ada", "and that")
    assert actions(store, "back") == [PROMOTED, DONE] * 3 + [ROLLED_BACK, DONE] * 2
    assert store.client.get_model_version("back", third).tags["promotion"] == "rolled back"


def test_a_rollback_leaps_over_versions_that_are_gone(store):
    versions = [store.register("gone") for _ in range(3)]
    for version, before in zip(versions, [None, *versions], strict=False):
        promote(store, "gone", version, before)
    store.client.delete_model_version("gone", versions[1])
    roll_back(store.client, "gone", "ada", "it flags every tile")
    assert store.aliases("gone") == {"champion": versions[0]}


def test_without_a_champion_there_is_nothing_to_roll_back(store):
    store.register("nobody")
    with pytest.raises(TrackingError, match="nobody has no champion that could be taken back"):
        roll_back(store.client, "nobody", "ada", "why not")


def test_a_version_with_an_alias_is_not_deleted_and_others_are(store):
    first, second, third = (store.register("forgotten") for _ in range(3))
    promote(store, "forgotten", second, None)
    with pytest.raises(TrackingError, match=f"version {second} of forgotten is champion, and stays"):
        delete_version(store.client, "forgotten", second, "ada", "no longer needed")
    with pytest.raises(TrackingError, match=f"version {third} of forgotten is challenger, and stays"):
        delete_version(store.client, "forgotten", third, "ada", "no longer needed")
    delete_version(store.client, "forgotten", first, "ada", "no longer needed")
    with pytest.raises(TrackingError, match=f"forgotten has no version {first}"):
        delete_version(store.client, "forgotten", first, "ada", "no longer needed")
    assert actions(store, "forgotten") == [PROMOTED, DONE, FORGOTTEN]


def test_an_override_is_a_move_like_any_other(store):
    first = store.register("overridden")
    record(store.client, "overridden", Entry(OVERRIDDEN, first, None, first, "ada", "the line needs it today"))
    assert store.aliases("overridden") == {"champion": first}
