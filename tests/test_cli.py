import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from loupe.cli import change_params
from loupe.config import load_params
from loupe.errors import ConfigError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def params(tmp_path):
    return Path(shutil.copy(ROOT / "params.yaml", tmp_path / "params.yaml"))


def call_loupe(*arguments, folder):
    return subprocess.run(
        [sys.executable, "-m", "loupe.cli", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LOUPE_TRACEBACK": ""},
        timeout=120,
    )


def test_a_changed_param_keeps_every_other_line_and_its_comment(params):
    before = params.read_text().splitlines()
    change_params(params, {"fetch.fraction": 0.5})
    after = params.read_text().splitlines()
    assert load_params(params).fetch.fraction == 0.5
    assert [(old, new) for old, new in zip(before, after, strict=True) if old.split() != new.split()] == [
        (line, line.replace("0.2 ", "0.5 ")) for line in before if "fraction: 0.2 " in line and "fetch" not in line
    ][:1]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("fetch.fractoin", 0.5, "did you mean 'fraction'"),
        ("fetch.fraction", 2, "fetch.fraction must be less than or equal to 1, got 2"),
        ("fetsch.fraction", 0.5, "no section 'fetsch'"),
    ],
)
def test_a_change_that_is_not_allowed_leaves_the_file_as_it_was(params, key, value, said):
    before = params.read_bytes()
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        change_params(params, {key: value})
    assert params.read_bytes() == before


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.mkdir(), "holds no images"),
        (lambda folder: folder.write_text("x"), "is a file"),
    ],
)
def test_a_folder_that_is_no_data_set_is_one_sentence_and_touches_nothing(params, tmp_path, make, said):
    make(tmp_path / "images")
    before = params.read_bytes()
    answer = call_loupe("run", "--data", "images", folder=tmp_path)
    assert answer.returncode == 1
    assert answer.stderr.startswith("error: images ")
    assert said in answer.stderr
    assert "Traceback" not in answer.stderr
    assert params.read_bytes() == before


def test_a_file_that_dvc_can_not_take_is_named_and_nothing_touched(params, tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.new("L", (16, 16)).save(tmp_path / "images" / "a" / "0.png")
    (tmp_path / "images" / "a" / "1.png").symlink_to("nowhere.png")
    before = params.read_bytes()
    answer = call_loupe("run", "--data", "images", folder=tmp_path)
    assert answer.returncode == 1
    assert "images/a/1.png is a link to nothing" in answer.stderr
    assert params.read_bytes() == before


def test_a_value_that_is_no_yaml_is_one_sentence(params, tmp_path):
    answer = call_loupe("run", "--set", "ingest.source=[a", folder=tmp_path)
    assert answer.returncode == 1
    assert answer.stderr.startswith("error: --set takes a value in YAML; '[a' is none")
    assert answer.stderr.count("\n") == 1


def test_a_file_that_the_system_refuses_is_one_sentence(params):
    params.with_name(".dvc").write_text("in the place of a folder")
    answer = call_loupe("run", "--set", "fetch.fraction=0.5", folder=params.parent)
    assert answer.returncode == 1
    assert answer.stderr == "error: .dvc/tmp: Not a directory\n"


def test_a_folder_without_params_is_told_where_to_go(tmp_path):
    answer = call_loupe("run", folder=tmp_path)
    assert answer.returncode == 1
    assert "params.yaml can't be read" in answer.stderr


def test_a_taken_port_is_said(tmp_path, params):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        answer = call_loupe("ui", "--mlflow-port", str(port), folder=tmp_path)
    assert answer.returncode == 1
    assert f"port {port} is taken" in answer.stderr


STUBBORN = """
import signal, sys, time
told = []
signal.signal(signal.SIGINT, lambda *_: told.append(1) or (len(told) > 1 and sys.exit(7)))
print("ready", flush=True)
time.sleep(60)
time.sleep(60)
"""


def test_a_program_that_loses_an_interruption_is_told_again():
    program = (
        f"from loupe.cli import starting; starting.PATIENCE_SECONDS = 0.2; sys.exit(starting._follow({STUBBORN!r}))"
    )
    heard = "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL)"  # a shell's background job would ignore it
    command = [sys.executable, "-c", f"import sys; {heard}; {program}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
        os.killpg(run.pid, signal.SIGINT)
        assert run.wait(30) == 7
