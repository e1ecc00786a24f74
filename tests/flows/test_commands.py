"""How the flow runs programs: alone, within their time, and never leaving a child behind."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from loupe.commands import alone_in_folder, run_command
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


def test_programs_keep_the_memory_that_they_free_unless_told_otherwise(monkeypatch):
    # Each array has 16 MB: given back to Linux, that would be 4,096 pages to be cleared again.
    program = (
        "import numpy, resource\n"
        "def fill(): numpy.ones((16, 1 << 18), dtype=numpy.float32)\n"
        "fill()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(20): fill()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    (faults,) = run_command(["python", "-c", program], 60)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=0:glibc.malloc.mmap_threshold=65536")
    (faults_otherwise,) = run_command(["python", "-c", program], 60)
    assert int(faults) < 100 < int(faults_otherwise)


def test_a_second_run_in_a_folder_waits_for_the_first_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ended = []

    def run_second():
        with alone_in_folder():
            ended.append("second")

    with alone_in_folder():
        second = threading.Thread(target=run_second)
        second.start()
        second.join(1)
        ended.append("first")
    second.join(30)
    assert ended == ["first", "second"]
    assert "another run is at work in this folder" in capsys.readouterr().err


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


def test_a_program_that_won_t_listen_ends_within_ten_seconds():
    program = (
        "import os, signal, time\n"
        "for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)\n"
        "print(os.getpid(), flush=True); time.sleep(600)"
    )
    lines = run_command(["python", "-c", program], 600)
    stubborn, started = int(next(lines)), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        lines.throw(KeyboardInterrupt())
    assert time.monotonic() - started < 10
    assert ends(stubborn)


def test_a_program_ends_with_a_caller_that_is_killed():
    program = (
        "from loupe.commands import run_command\n"
        "inner = 'import os, time; print(os.getpid(), flush=True); time.sleep(600)'\n"
        "for line in run_command(['python', '-c', inner], 600): print(line, flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as caller:
        child = int(caller.stdout.readline())
        caller.kill()
    assert ends(child)


def test_programs_run_the_current_folders_code(tmp_path):
    (tmp_path / "src" / "loupe").mkdir(parents=True)
    (tmp_path / "src" / "loupe" / "__init__.py").touch()
    (tmp_path / "src" / "loupe" / "marker.py").write_text("print('of this folder')")
    assert list(run_command(["python", "-c", "import loupe.marker"], 60)) == ["of this folder"]


def test_a_program_that_only_reads_waits_for_nobody():
    busy = run_command(["python", "-c", "import time; print('busy', flush=True); time.sleep(600)"], 600)
    assert next(busy) == "busy"
    assert list(run_command(["python", "-c", "print('beside')"], 60, alone=False)) == ["beside"]
    busy.close()


def test_stages_come_after_what_they_depend_on(monkeypatch):
    monkeypatch.chdir(ROOT)
    stages = list_stages()
    assert stages[:3] == ["data/fashion_mnist/dvc.yaml:fetch", "ingest", "validate"]
    assert stages.index("train_detector") < stages.index("evaluate_detector")
    assert stages.index("train_classifier") < stages.index("export_classifier")
    assert len(stages) == 12


def test_a_stage_whose_parent_was_killed_ends_too():
    program = (
        "import os, subprocess, sys\n"
        "child = 'from loupe.stages.entry import end_with_parent; import time; end_with_parent(); '\n"
        "child += 'print(chr(46), flush=True); time.sleep(600)'\n"
        "stage = subprocess.Popen([sys.executable, '-c', child], stdout=subprocess.PIPE)\n"
        "assert stage.stdout.read(2)\n"
        "print(stage.pid, flush=True)\n"
        "os._exit(0)"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ)
    assert ends(int(answer.stdout))


def test_an_interruption_while_a_program_ends_is_not_heard():
    program = (
        "import atexit, signal, time\n"
        "from loupe.stages.entry import ending_in_a_sentence\n"
        "def end(): print('ending', flush=True); time.sleep(3); print('ended', flush=True)\n"
        "atexit.register(end)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it\n"
        "with ending_in_a_sentence(): print('at work', flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in ("at work\n", "ending\n"):
            assert process.stdout.readline() == line
            process.send_signal(signal.SIGINT)
        told, complaints = process.communicate(timeout=60)
    assert told == "ended\n"
    assert complaints == "interrupted: what has ended is kept, and the same command goes on from there\n"
    assert process.returncode == 128 + signal.SIGINT
