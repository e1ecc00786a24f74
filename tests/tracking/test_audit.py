import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException

from loupe.errors import TrackingError
from loupe.tracking.audit import (
    AUDIT_TAG,
    DONE,
    KEPT,
    LONGEST,
    MOVED_OUTSIDE,
    PROMOTED,
    ROLLED_BACK,
    UNDONE,
    Entry,
    append_entry,
    compute_champions,
    create_model,
    find_latest,
    load_audit,
)

DECISION = Entry(KEPT, "2", "1", "1", "ada", "accuracy 0.7 is below the floor of 0.8", "d1", "q1", {"challenger": 0.7})


def move(action, before, after):
    return [Entry(action, after, before, after, "ada", "why"), Entry(DONE, after, before, after, "ada", "")]


def test_entries_come_back_as_they_were_written(store):
    create_model(store.client, "written", store.experiment_id)
    entries = [DECISION, replace(DECISION, why="Größe « reicht » nicht", champion_from=None, champion_to=None)]
    for number, entry in enumerate(entries, 1):
        assert append_entry(store.client, "written", entry, number)
    assert load_audit(store.client, "written") == entries


def test_a_number_is_given_once_and_what_has_it_is_never_rewritten(store):
    create_model(store.client, "once", store.experiment_id)
    assert append_entry(store.client, "once", DECISION, 1)
    assert not append_entry(store.client, "once", replace(DECISION, who="eve", mark="0"), 1)
    run_id = store.client.get_registered_model("once").tags[AUDIT_TAG]
    with pytest.raises(MlflowException, match="not allowed"):
        store.client.log_param(run_id, "000001", "{}")
    assert load_audit(store.client, "once") == [DECISION]


def test_a_second_call_finds_the_model_and_its_audit(store):
    create_model(store.client, "twice", store.experiment_id)
    append_entry(store.client, "twice", DECISION, 1)
    create_model(store.client, "twice", store.experiment_id)
    assert load_audit(store.client, "twice") == [DECISION]


def test_a_model_from_before_there_were_audits_gets_one(store):
    store.client.create_registered_model("old")
    assert load_audit(store.client, "old") == []
    create_model(store.client, "old", store.experiment_id)
    assert append_entry(store.client, "old", DECISION, 1)


def test_a_gap_is_an_error(store):
    create_model(store.client, "gap", store.experiment_id)
    append_entry(store.client, "gap", DECISION, 2)
    with pytest.raises(TrackingError, match="the audit of gap has gaps"):
        load_audit(store.client, "gap")


def test_an_entry_that_mlflow_would_cut_is_refused(store):
    create_model(store.client, "long", store.experiment_id)
    with pytest.raises(TrackingError, match=f"at most {LONGEST} characters"):
        append_entry(store.client, "long", replace(DECISION, why="x" * LONGEST), 1)
    bare = len(DECISION.why)
    longest = LONGEST - (len_of(DECISION) - bare)
    assert append_entry(store.client, "long", replace(DECISION, why="ö" * longest), 1)
    assert len(load_audit(store.client, "long")[0].why) == longest


def len_of(entry):

    return len(json.dumps(asdict(entry), ensure_ascii=False))


def test_an_audit_whose_run_was_deleted_says_so_and_can_still_be_read(store):
    create_model(store.client, "deleted", store.experiment_id)
    append_entry(store.client, "deleted", DECISION, 1)
    store.client.delete_run(store.client.get_registered_model("deleted").tags[AUDIT_TAG])
    assert load_audit(store.client, "deleted") == [DECISION]
    with pytest.raises(TrackingError, match="the audit of deleted takes no entry"):
        append_entry(store.client, "deleted", DECISION, 2)


def test_a_model_that_nobody_registered_is_one_sentence(store):
    with pytest.raises(TrackingError, match="MLflow has no registered model 'nothing'"):
        load_audit(store.client, "nothing")


def test_champions_follow_each_other_and_a_rollback_takes_the_last_ones_off():
    entries = [*move(PROMOTED, None, "1"), DECISION, *move(PROMOTED, "1", "2"), *move(PROMOTED, "2", "4")]
    assert compute_champions(entries) == ["1", "2", "4"]
    assert compute_champions([*entries, *move(ROLLED_BACK, "4", "2")]) == ["1", "2"]
    assert compute_champions([*entries, *move(ROLLED_BACK, "4", "1"), *move(PROMOTED, "1", "5")]) == ["1", "5"]


def test_what_was_undone_never_was():
    begun, done = move(PROMOTED, "1", "2")
    assert compute_champions([*move(PROMOTED, None, "1"), begun, replace(done, action=UNDONE)]) == ["1"]


def test_a_champion_that_was_moved_outside_counts_and_its_removal_leaves_the_others():
    outside = Entry(MOVED_OUTSIDE, "3", "1", "3", "not known", "")
    removed = Entry(MOVED_OUTSIDE, None, "3", None, "not known", "")
    entries = [*move(PROMOTED, None, "1"), outside]
    assert compute_champions(entries) == ["1", "3"]
    assert compute_champions([*entries, removed]) == ["1", "3"]


def test_the_latest_word_on_a_version_is_not_that_a_move_is_done():
    entries = [replace(DECISION, version="2"), *move(PROMOTED, "1", "2")]
    assert find_latest(entries, "2").action == PROMOTED
    assert find_latest(entries, "9") is None


@given(st.lists(st.booleans(), max_size=20))
def test_promotions_and_rollbacks_are_a_stack(promotes):
    entries, expected = [], []
    for number, promoting in enumerate(promotes):
        before = expected[-1] if expected else None
        if promoting:
            expected.append(str(number))
            entries += move(PROMOTED, before, str(number))
        elif len(expected) > 1:
            expected.pop()
            entries += move(ROLLED_BACK, before, expected[-1])
    assert compute_champions(entries) == expected
