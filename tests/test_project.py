"""The project's own shape: what dvc.yaml says of each stage is true, and nothing local is committed."""

import ast
import re
import subprocess
from pathlib import Path

import grimp
import pytest
import yaml

from loupe.stages.__main__ import OF_IMAGES, OF_TASKS

ROOT = Path(__file__).parent.parent
# These parse, name and report, and compute nothing: no stage is done again because of them.
COMPUTE_NOTHING = {
    "src/loupe/config.py",
    "src/loupe/errors.py",
    "src/loupe/stages/entry.py",
    "src/loupe/stages/files.py",
    "src/loupe/stages/skipping.py",
}


def load_stages():
    stages = {}
    for path in (ROOT / "dvc.yaml", ROOT / "data/fashion_mnist/dvc.yaml"):
        stages |= yaml.safe_load(path.read_text())["stages"]
    return stages


STAGES = load_stages()


@pytest.fixture(scope="module")
def imports():
    return grimp.build_graph("loupe")


def locate(module):
    path = ROOT / "src" / Path(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return file.relative_to(ROOT).as_posix()


def is_docstring_alone(file):
    return len(ast.parse((ROOT / file).read_text()).body) == 1


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_runs_the_module_of_its_name(name):
    assert STAGES[name]["cmd"] == f"python -m loupe.stages {name}"
    assert (ROOT / f"src/loupe/stages/{name}.py").exists()


def test_the_stages_that_can_be_run_are_those_of_dvc():
    assert set(OF_IMAGES + OF_TASKS) == set(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_all_the_code_it_imports(name, imports):
    module = f"loupe.stages.{name}"
    used = {locate(one) for one in {module, *imports.find_upstream_modules(module)}}
    used = {file for file in used - COMPUTE_NOTHING if not is_docstring_alone(file)}
    deps = [dep for dep in STAGES[name]["deps"] if dep.startswith("src/")]
    covered = {file for file in used if any(file == dep or file.startswith(f"{dep}/") for dep in deps)}
    assert used - covered == set()


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_reads_only_the_params_it_declares(name):
    declared = {param.partition(".")[0] for param in STAGES[name].get("params", [])}
    tree = ast.parse((ROOT / f"src/loupe/stages/{name}.py").read_text())
    read = {
        node.attr.rstrip("_")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "params"
    }
    assert read <= declared


def test_no_tracked_file_names_a_registry_or_a_machine():
    pattern = "|".join(
        ("py" + r"pi\.org", "python" + "hosted", r"registry\.npm" + "js", "/ho" + "me/[a-z]+/[a-z]", "/ro" + "ot/")
    )
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    texts = {
        file: (ROOT / file).read_bytes().decode(errors="ignore") for file in files if file and (ROOT / file).is_file()
    }
    assert [file for file, text in texts.items() if file != "Dockerfile" and re.search(pattern, text)] == []
