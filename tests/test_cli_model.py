import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from loupe.cli import app
from loupe.errors import ConfigError


@pytest.fixture
def show(monkeypatch):
    def show(*arguments, columns=100):
        monkeypatch.setenv("COLUMNS", str(columns))
        answer = CliRunner().invoke(app, ["model", *arguments], catch_exceptions=False)
        assert answer.exit_code == 0
        return answer.output.splitlines()

    return show


def test_a_network_is_shown_layer_by_layer_with_its_totals(show):
    lines = show("lenet5")
    assert lines[0].strip() == "lenet5 on 1x32x32"
    rows = [line.split() for line in lines[4:12]]
    assert rows[0] == ["features.c1", "Conv2d", "5x5", "6x28x28", "156", "5"]
    assert rows[1] == ["features.s2", "MaxPool2d", "2x2", "/2", "6x14x14", "6"]
    assert rows[-1] == ["head", "Linear", "10", "850", "whole", "image"]
    assert lines[13] == "61,706 parameters (0.25 MB), 416,520 multiply-adds an image"


def test_size_channels_and_classes_can_be_chosen(show):
    lines = show("resnet18", "--size", "128x256", "--channels", "1", "--classes", "4")
    assert lines[0].strip() == "resnet18 on 1x128x256"
    assert "64x64x128" in lines[4]
    assert any(line.split()[:3] == ["fc", "Linear", "4"] for line in lines)


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0"])
def test_the_rows_of_common_networks_fit_80_columns(show, name):
    lines = show(name, columns=80)
    assert max(len(line) for line in lines) <= 80
    assert all(len(line.split()) > 3 for line in lines[4:-5])  # none is folded


@pytest.mark.parametrize("size", ["0", "x", "-3", "12x", "1x2x3", "12.5", ""])
def test_a_size_that_is_none_says_what_one_is(size):
    with pytest.raises(ConfigError, match=r"--size takes a side such as 224, or height x width such as 128x256; got"):
        CliRunner().invoke(app, ["model", "lenet5", "--size", size], catch_exceptions=False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lenet6"], "error: timm has no backbone 'lenet6'; nearest names: lenet5"),
        (["lenet5", "--size", "28"], "error: lenet5 needs images of at least 32 x 32 pixels, got 28 x 28"),
    ],
)
def test_what_can_not_be_shown_is_one_sentence(arguments, said):
    answer = subprocess.run(
        [sys.executable, "-m", "loupe.cli", "model", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LOUPE_TRACEBACK": ""},
        timeout=120,
    )
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr.startswith(said)
    assert answer.stderr.count("\n") == 1


def test_the_commands_are_there_before_torch_is():
    code = "import sys, loupe.cli; sys.exit(any(name in sys.modules for name in ('torch', 'timm', 'pandas')))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
