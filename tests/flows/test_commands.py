"""How the flow runs programs: alone, within their time, and never leaving a child behind."""

import contextlib
import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from loupe.commands import run_command
from loupe.errors import PipelineError
from pipelines.training import list_stages

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def ends(process):
    """Whether it does so soon; what nobody asks for its status stays a zombie."""
    deadline = time.monotonic() + 10
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
    return True


def test_lines_come_in_order_and_blank_ones_are_left_out():
    assert list(run_command(["python", "-c", "print('one\\n\\ntwo')"], 60)) == ["one", "two"]


def test_a_failure_carries_the_programs_own_sentence():
    program = "import sys; print('working'); sys.exit('error: DATA is a file')"
    with pytest.raises(PipelineError, match=r"^DATA is a file$"):
        list(run_command(["python", "-c", program], 60))


def test_a_failure_without_a_sentence_names_the_program():
    with pytest.raises(PipelineError, match="ended with 3"):
        list(run_command(["python", "-c", "raise SystemExit(3)"], 60))


def test_a_program_that_runs_out_of_time_ends_with_its_children():
    program = (
        "import subprocess, sys, time\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid, flush=True)\n"
        "time.sleep(600)"
    )
    started, lines = time.monotonic(), run_command(["python", "-c", program], 2)
    child = int(next(lines))
    with pytest.raises(PipelineError, match="ran longer than"):
        list(lines)
    assert time.monotonic() - started < 30
    assert ends(child)


def test_an_interruption_ends_the_program():
    lines = run_command(["python", "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"], 600)
    program = int(next(lines))
    with pytest.raises(KeyboardInterrupt):
        lines.throw(KeyboardInterrupt())
    assert not psutil.pid_exists(program)


def test_stages_come_after_what_they_depend_on(monkeypatch):
    monkeypatch.chdir(ROOT)
    stages = list_stages()
    assert stages[:3] == ["data/fashion_mnist/dvc.yaml:fetch", "ingest", "validate"]
    assert stages.index("train_detector") < stages.index("evaluate_detector")
    assert stages.index("train_classifier") < stages.index("export_classifier")
    assert len(stages) == 12


def test_a_stage_whose_parent_was_killed_ends_too(tmp_path):
    program = (
        "import subprocess, sys, time\n"
        "child = 'from loupe.stages.entry import _end_with_parent; import time; _end_with_parent(); time.sleep(600)'\n"
        "print(subprocess.Popen([sys.executable, '-c', child]).pid, flush=True)\n"
        "time.sleep(3); import os; os._exit(0)"
    )
    import subprocess

    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ)
    child, deadline = int(answer.stdout), time.monotonic() + 10
    while psutil.pid_exists(child) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not psutil.pid_exists(child)
