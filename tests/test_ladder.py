"""The ladder: two of its recipes for real, on a few tiny images, and its page and table over figures that are given."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys

import mlflow
import pandas as pd
import pytest
from rich.console import Console

from loupe.cli import change_params
from loupe.config import load_params
from loupe.errors import TrackingError, WeightsError
from loupe.experiments import Result
from loupe.ladder import (
    COURSE,
    TRAINS,
    Ladder,
    Step,
    build_experiment,
    build_table,
    climb_ladder,
    flatten_ladder,
    record_ladder,
    render_ladder,
    write_time,
)
from loupe.reporting.page import save_page
from loupe.stages.files import DataSet
from loupe.training.classifier import RECIPES

HOSTILE = "<script>alert(1)</script>"
TINY = {"train_classifier.epochs": 1, "evaluate_classifier.num_pictures": 1, "prepare.classifier.input_size": 32}


def call_ladder(folder, *recipes):
    """The command itself, with these recipes alone."""
    program = (
        "import sys, loupe.ladder as ladder; from loupe.cli import main\n"
        "ladder.TRAINS = {name: ladder.TRAINS[name] for name in sys.argv[2:]}; del sys.argv[2:]; main()\n"
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "DVC_"))}
    return subprocess.run(
        [sys.executable, "-c", program, "ladder", *recipes],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**kept, "DVC_NO_ANALYTICS": "1"},
        timeout=600,
    )


def take_stock(folder):
    """Contents of all files of a working copy, but for what the ladder is there to write."""
    files = (path for path in folder.rglob("*") if path.is_file() and not {".git", ".dvc"} & set(path.parts))
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in (path.relative_to(folder).as_posix() for path in files)
        if not name.startswith(("reports/ladder.", "mlflow.db", "mlartifacts/", ".mlflow.lock"))
    }


@pytest.fixture(scope="module")
def project(tmp_path_factory, repository, write):
    """What the ladder needs of the project, committed, with images beside it and params that are not committed."""
    folder = tmp_path_factory.mktemp("project")
    for number in range(20):
        write(folder.parent / "pets/cat" / f"{number}.png", number)
        write(folder.parent / "pets/dog" / f"{number}.png", 100 + number)
    shutil.copytree(repository / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in (".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore", "dvc.yaml", "params.yaml"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(repository / name, folder / name)
    for command in (["init", "-q"], ["config", "user.name", "t"], ["config", "user.email", "t@example.invalid"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    for command in (["add", "-A"], ["commit", "-qm", "start"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    change_params(folder / "params.yaml", {**TINY, "ingest.source": "../pets"})
    return folder


@pytest.fixture(scope="module")
def climbed(project):
    """What the command said of two recipes, and the working copy before it."""
    stock = take_stock(project)
    return call_ladder(project, "scratch", "features"), stock


@pytest.fixture(scope="module")
def figures(project, climbed):
    answer, _ = climbed
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return json.loads((project / "reports/ladder.json").read_text())


@pytest.fixture(scope="module")
def runs(project, figures):
    """The MLflow runs by recipe, from the project's own store."""
    client = mlflow.MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    return {recipe: client.get_run(figures[f"{recipe}/run_id"]) for recipe in ("scratch", "features")}


def build_ladder(name="pets", accuracy=0.75):
    counts = {"train/num_images": 2000, "test/num_images": 1000}
    figures = {"accuracy": accuracy, "macro_f1": accuracy}
    figures |= {f"{key}_low": value - 0.02 for key, value in figures.items()} | {
        f"{key}_high": value + 0.02 for key, value in figures.items()
    }
    tested = {f"test/{key}": value for key, value in figures.items()}
    steps = [Step(recipe, 3, 0.8, 0.4, {**tested, **counts}, 100.4, "f" * 32) for recipe in TRAINS]
    return Ladder(DataSet(name, "/pets", "class_folders", 3500, 0), "small_cnn", steps, "1")


@pytest.fixture
def show(browser):
    """Opens a page at a width, and gives it with what it requested."""
    contexts = []

    def show(path, width=1400, scheme="light"):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        page, requested = contexts[-1].new_page(), []
        page.on("request", lambda request: requested.append(request.url))
        page.goto(path.as_uri())
        return page, requested

    yield show
    for context in contexts:
        context.close()


def test_every_recipe_is_a_step_and_has_the_courses_figure():
    assert tuple(TRAINS) == tuple(COURSE) == tuple(RECIPES)


def test_the_working_copy_stays_as_it_is(project, climbed, figures):
    assert take_stock(project) == climbed[1]
    status = subprocess.run(["git", "status", "--porcelain"], cwd=project, capture_output=True, text=True, check=True)
    assert status.stdout == " M params.yaml\n"


def test_the_command_ends_with_a_table_and_says_where_to_look(climbed, figures):
    told = climbed[0].stdout
    for recipe in ("scratch", "features"):
        (row,) = re.findall(rf"^{recipe}  +\d.*$", told, re.MULTILINE)
        assert f"{figures[f'{recipe}/val/accuracy']:.4f}" in row
        assert f"{figures[f'{recipe}/test/accuracy']:.4f}" in row
        assert figures[f"{recipe}/run_id"][:8] in row
    for said in ("reports/ladder.html", "Nothing was chosen by the test figures", "scratch 0.70", "make ui"):
        assert said in told
    assert figures["mlflow_page"] in told


def test_figures_are_flat_and_those_of_the_runs(figures, runs):
    assert figures["data/name"] == "pets"
    for recipe, run in runs.items():
        assert run.data.params["train_classifier.recipe"] == recipe
        assert run.data.metrics["classifier/test/accuracy"] == figures[f"{recipe}/test/accuracy"]
        assert figures[f"{recipe}/training_seconds"] == (run.info.end_time - run.info.start_time) / 1000


def test_runs_are_named_tagged_and_have_the_same_metrics(runs):
    assert [run.info.run_name for run in runs.values()] == [run.data.tags["ladder"] for run in runs.values()]
    names = [
        {name for name in run.data.metrics if name.startswith(("train/", "val/")) or name.count("/") == 2}
        for run in runs.values()
    ]
    assert {"train/loss", "val/loss", "val/accuracy", "classifier/test/accuracy_low"} <= names[0]
    assert names[0] == names[1]
    assert len({run.info.experiment_id for run in runs.values()}) == 1


def test_the_page_shows_the_figures(project, figures, show):
    page, requested = show(project / "reports/ladder.html")
    assert requested == [(project / "reports/ladder.html").as_uri()]
    rows = page.locator(".recipes tbody tr").all()
    assert [row.locator("th").inner_text() for row in rows] == ["scratch", "features"]
    for row, recipe in zip(rows, ("scratch", "features"), strict=True):
        shown = row.locator(".accuracy").inner_text()
        accuracy, low, high = (figures[f"{recipe}/test/accuracy{end}"] for end in ("", "_low", "_high"))
        assert shown.split("\n") == [f"{accuracy:.1%}", f"{low:.1%} to {high:.1%}"]
        assert figures[f"{recipe}/run_id"] in row.locator("a").get_attribute("href")
    assert page.locator("#mlflow a").get_attribute("href") == figures["mlflow_page"]
    assert "Nothing was chosen by the test figures" in page.locator("header").inner_text()


def test_a_second_time_nothing_is_trained(project, figures):
    again = call_ladder(project, "features")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Stage 'train_classifier' is cached" in again.stdout
    assert "Running stage 'train_classifier'" not in again.stdout
    after = json.loads((project / "reports/ladder.json").read_text())
    assert after["features/run_id"] == figures["features/run_id"]


def test_without_params_the_command_is_one_sentence(tmp_path):
    answer = call_ladder(tmp_path, *TRAINS)
    assert answer.returncode == 1
    assert re.fullmatch(r"error: params\.yaml can't be read.*\n", answer.stderr)


@pytest.mark.parametrize(
    ("recipe", "given", "used"),
    [
        ("scratch", "hub", "auto"),
        ("scratch_augmented", "none", "auto"),
        ("features", "none", "auto"),
        ("fine_tuned", "hub", "hub"),
    ],
)
def test_what_learns_from_scratch_has_no_weights_and_others_have_those_of_the_params(repository, recipe, given, used):
    section = load_params(repository / "params.yaml").train_classifier.model_copy(update={"weights": given})
    experiment = build_experiment(recipe, section)
    assert experiment.name == f"ladder-{recipe}"
    assert experiment.changes == {"train_classifier.recipe": recipe, "train_classifier.weights": used}


def test_a_file_of_weights_is_found_from_an_experiments_folder(repository, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = load_params(repository / "params.yaml").train_classifier.model_copy(update={"weights": "a.safetensors"})
    changes = build_experiment("features", section).changes
    assert changes["train_classifier.weights"] == str(tmp_path / "a.safetensors")


def test_runs_that_the_store_lacks_are_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    ladder = build_ladder()
    result = Result({}, pd.DataFrame(), "0" * 32, ladder.data_set)
    with pytest.raises(TrackingError, match=r"other\.db does not hold the runs of scratch, features, whose results"):
        record_ladder("small_cnn", {"scratch": result, "features": result})


def test_the_table_fits_80_columns():
    console = Console(width=80, record=True, highlight=False)
    console.print(build_table(build_ladder()))
    lines = console.export_text().splitlines()
    assert len(lines) == 4 + 2 * len(TRAINS)
    assert all(text in "\n".join(lines) for text in TRAINS.values())


def test_figures_for_machines_have_a_flat_name_for_all():
    flat = flatten_ladder(build_ladder())
    assert flat["fine_tuned/best_epoch"] == 3
    assert flat["features_augmented/test/accuracy_low"] == pytest.approx(0.73)
    assert all(isinstance(value, int | float | str) for value in flat.values())


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_the_window_and_draws_all_recipes(tmp_path, show, width, scheme):
    save_page(render_ladder(build_ladder(HOSTILE)), tmp_path / "ladder.html")
    page, _ = show(tmp_path / "ladder.html", width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("h1").inner_text() == HOSTILE
    drawing = page.locator(".intervals > svg")
    frame = drawing.bounding_box()
    assert drawing.locator("line.range").count() == drawing.locator(".name").count() == len(TRAINS)
    for name in drawing.locator(".name").all():
        assert name.bounding_box()["x"] >= frame["x"]


def test_all_figures_alike_are_drawn_too():
    assert render_ladder(build_ladder(accuracy=1.0)).count('class="range"') == len(TRAINS) + 1


@pytest.mark.parametrize(("seconds", "written"), [(0.4, "0:00"), (59.6, "1:00"), (61, "1:01"), (4000, "66:40")])
def test_time_is_minutes_and_seconds(seconds, written):
    assert write_time(seconds) == written


def test_a_backbone_whose_weights_no_package_carries_is_refused_before_the_first_recipe(repository):
    params = load_params(repository / "params.yaml")
    section = params.train_classifier.model_copy(update={"backbone": "test_resnet"})
    with pytest.raises(WeightsError, match="no package carries weights of 'test_resnet'"):
        climb_ladder(params.model_copy(update={"train_classifier": section}))
