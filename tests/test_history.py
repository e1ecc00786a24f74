import io
import re
import subprocess
import sys

import pytest
from rich.console import Console

from loupe.history import build_history
from loupe.tracking.audit import DONE, KEPT, PROMOTED, UNDONE, Entry


def show(*entries):
    """The rows of the table, with single spaces."""
    said = io.StringIO()
    Console(file=said, width=200).print(build_history("tiles-detector", list(entries)))
    return [re.sub(r"\s+", " ", line).strip() for line in said.getvalue().splitlines()]


def entry(action, version, before, after, why="it is better"):
    return Entry(action, version, before, after, "ada", why, data="0123456789", when="2026-01-02T03:04:05+00:00")


def test_a_decision_is_a_row_with_who_when_what_on_which_data_and_why():
    rows = show(entry(KEPT, "2", "1", "1", "too weak"))
    assert "1 2026-01-02 03:04:05 ada kept 2 1 01234567 too weak" in rows


@pytest.mark.parametrize(
    ("ends", "number", "state"), [([DONE], "1–2", ""), ([UNDONE], "1–2", " (undone)"), ([], "1", " (unfinished)")]
)
def test_a_move_and_its_end_are_one_row(ends, number, state):
    entries = [entry(PROMOTED, "2", None, "2"), *(entry(end, "2", None, "2", "") for end in ends)]
    rows = show(*entries)
    assert f"{number} 2026-01-02 03:04:05 ada promoted 2{state} nobody → 2 01234567 it is better" in rows
    assert len([row for row in rows if "ada" in row]) == 1


def test_what_a_person_wrote_is_shown_as_it_is():
    assert any(
        "try [/red] of [bold]5[/bold]" in row
        for row in show(entry(KEPT, "2", "1", "1", "try [/red] of [bold]5[/bold]"))
    )


def test_an_empty_audit_is_an_empty_table():
    assert show()[0] == "The audit of tiles-detector"


def test_who_reads_the_record_waits_for_no_network():
    code = "import sys, loupe.history, loupe.runs; sys.exit(any(name in sys.modules for name in ('torch', 'timm')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
