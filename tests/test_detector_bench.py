"""The bench of the detectors: three of them for real, on a few tiny images; page and table over given figures."""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace

import mlflow
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from loupe.cli import change_params
from loupe.cli.making import _parse_list, _parse_seed
from loupe.config import load_params
from loupe.detector_bench import (
    NAMES,
    SCORES,
    Bench,
    Cost,
    Member,
    build_experiments,
    build_table,
    compute_spread,
    flatten_bench,
    list_timed_images,
    record_bench,
    render_bench,
    write_spread,
)
from loupe.errors import ConfigError, DataError, PipelineError
from loupe.experiments import Comparison
from loupe.models.detectors.family import FAMILY
from loupe.reporting.page import save_page
from loupe.stages.files import BUILT_IN, DataSet

HOSTILE = "<script>alert(1)</script>"
TINY = {
    "train_detector.autoencoder.epochs": 1,
    "evaluate_detector.num_pictures": 1,
    "prepare.detector.input_size": 64,
}
FITTED = ("knn_patches", "autoencoder")


def call_bench(folder, *arguments):
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "DVC_"))}
    return subprocess.run(
        [sys.executable, "-m", "loupe.cli", "bench", "detectors", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**kept, "DVC_NO_ANALYTICS": "1"},
        timeout=900,
    )


def git(folder, *arguments):
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def bolts(tmp_path_factory, write):
    """Ten good bolts to fit to, of which eight remain when two are held out; at test three good and three scratched."""
    root = tmp_path_factory.mktemp("images") / "bolts"
    for number in range(10):
        write(root / "train/good" / f"{number}.png", number)
    for number in range(3):
        write(root / "test/good" / f"{number}.png", 20 + number)
        write(root / "test/scratch" / f"{number}.png", 30 + number)
        mask = np.zeros((20, 24), np.uint8)
        mask[4 * number : 4 * number + 4, 8:16] = 255
        path = root / "ground_truth/scratch" / f"{number}_mask.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(path)
    return root


@pytest.fixture(scope="module")
def project(tmp_path_factory, repository):
    """What the bench needs of the project, committed; its params name a folder that is not there."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(repository / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in (".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore", "dvc.yaml", "params.yaml"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(repository / name, folder / name)
    change_params(folder / "params.yaml", {**TINY, "ingest.source": "../lacking"})
    for command in (["init", "-q"], ["config", "user.name", "t"], ["config", "user.email", "t@example.invalid"]):
        git(folder, *command)
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "start")
    return folder


@pytest.fixture(scope="module")
def answer(project, bolts):
    """What the command said of two detectors that can be fitted to eight images, and of one that can't."""
    models = ",".join(("padim", *FITTED))
    return call_bench(project, os.path.relpath(bolts, project), "--models", models, "--seeds", "3")


@pytest.fixture(scope="module")
def figures(project, answer):
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return json.loads((project / "reports/detector_bench.json").read_text())


@pytest.fixture(scope="module")
def runs(project, figures):
    client = mlflow.MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    return {name: client.get_run(figures[f"{name}/seed_3/run_id"]) for name in FITTED}


def build_bench(name="bolts", seeds=(0, 1, 2), auroc=0.75):
    """All detectors; the last was never fitted, and padim not with the last seed."""
    members = []
    for place, model in enumerate(NAMES):
        fitted = seeds[: len(seeds) - (model == "padim")] if model != NAMES[-1] else ()
        values = {
            seed: dict.fromkeys(SCORES, auroc + 0.01 * place - 0.02 * seed) | {"train/seconds": 100.0 + seed}
            for seed in fitted
        }
        problems = {seed: f"too few: {HOSTILE}" for seed in seeds if seed not in fitted}
        run_ids = dict.fromkeys(fitted, "f" * 32)
        members.append(Member(model, values, run_ids, problems, Cost(12.3, 4.5, 6_700_000) if fitted else None))
    address = 'http://127.0.0.1:5000/#/compare-runs?runs=["f"]&experiments=["1"]'
    return Bench(DataSet(name, "/bolts", "mvtec", 16, 0), seeds, members, Comparison("1", address, {}))


@pytest.fixture
def show(browser):
    """Opens a page at a width."""
    contexts = []

    def show(path, width=1400, scheme="light"):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.goto(path.as_uri())
        return page

    yield show
    for context in contexts:
        context.close()


def test_every_detector_of_the_family_has_a_row():
    assert set(NAMES) == set(FAMILY) - {"tiled"}


def test_the_working_copy_stays_as_it_is(project, figures):
    assert git(project, "status", "--porcelain") == ""
    assert not (project / "models").exists()


def test_the_command_ends_with_a_table_and_says_where_to_look(answer, figures):
    assert f"{figures['knn_patches/test/image_auroc_mean']:.4f}" in answer.stdout
    for name in FITTED:
        (row,) = re.findall(rf"^{name} .*$", answer.stdout, re.MULTILINE)
        assert f"{figures[f'{name}/test/aupro_mean']:.4f}" in row
    (row,) = re.findall(r"^padim .*$", answer.stdout, re.MULTILINE)
    assert re.fullmatch(r"padim( +–)+ *", row)
    for said in ("reports/detector_bench.html", "Nothing was chosen by the test figures", figures["mlflow_page"]):
        assert said in answer.stdout


def test_a_detector_that_cant_be_fitted_is_a_row_with_its_sentence(answer, figures):
    sentence = figures["padim/seed_3/problem"]
    assert sentence.startswith("padim needs at least 10 normal images to be fitted, got 8")
    assert f"padim, seed 3 was not fitted: {sentence}" in answer.stdout
    assert "padim/test/image_auroc_mean" not in figures


def test_figures_are_flat_and_those_of_the_runs(figures, runs):
    assert figures["data/name"] == "bolts"
    assert all(isinstance(value, int | float | str) for value in figures.values())
    for name, run in runs.items():
        assert run.data.params["train_detector.model"] == name
        assert run.data.params["seed"] == "3"
        for figure in SCORES:
            assert run.data.metrics[f"detector/{figure}"] == figures[f"{name}/{figure}_mean"]


def test_runs_are_named_and_tagged(runs):
    for name, run in runs.items():
        assert run.info.run_name == run.data.tags["detector_bench"] == f"{name}-3"


def test_each_fitted_detector_is_measured(figures, runs):
    for name in FITTED:
        assert figures[f"{name}/milliseconds_alone"] > 0
        assert figures[f"{name}/milliseconds_in_batch"] > 0
    # A bank of 4,096 patches of 40 + 112 channels and the backbone, against an autoencoder of some ten thousand values.
    assert figures["knn_patches/num_bytes"] > 4096 * 152 * 4 > figures["autoencoder/num_bytes"] > 0


def test_the_page_shows_the_figures(project, figures, show):
    page = show(project / "reports/detector_bench.html")
    rows = page.locator(".members tbody tr").all()
    assert [row.locator("th").inner_text() for row in rows] == ["padim", "knn patches", "autoencoder"]
    assert f"{figures['autoencoder/test/aupro_mean']:.4f}" in rows[2].inner_text()
    assert figures["autoencoder/seed_3/run_id"] in rows[2].locator("a").get_attribute("href")
    assert "padim needs at least 10" in page.locator("#problems").inner_text()
    assert page.locator("#mlflow a").get_attribute("href") == figures["mlflow_page"]
    assert "Nothing was chosen by the test figures" in page.locator("header").inner_text()


def test_a_folder_that_is_not_there_is_one_sentence_before_anything_runs(repository):
    answer = call_bench(repository, "nowhere", "--seeds", "0 1")
    assert answer.returncode == 1
    assert answer.stderr == "error: nowhere does not exist: expected a folder of images\n"
    assert answer.stdout == ""


def test_lists_are_divided_by_commas_or_spaces():
    assert _parse_list("padim, vae  autoencoder") == ["padim", "vae", "autoencoder"]
    assert _parse_list("") == []


@pytest.mark.parametrize("seed", ["one", "-1", "1.5", "²"])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(ConfigError, match="--seeds takes whole numbers from 0 on"):
        _parse_seed(seed)


def test_experiments_are_of_each_detector_and_seed_on_the_data_that_is_given(repository, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = load_params(repository / "params.yaml")
    params = params.model_copy(
        update={"train_detector": params.train_detector.model_copy(update={"weights": "a.safetensors"})}
    )
    experiments = build_experiments(params, tmp_path / "x/../bolts", ["vae", "padim"], [4, 2])
    assert list(experiments) == [("padim", 4), ("padim", 2), ("vae", 4), ("vae", 2)]
    experiment = experiments["padim", 2]
    assert experiment.name == "bench-padim-2"
    assert experiment.changes == {
        "ingest.source": str(tmp_path / "bolts"),
        "seed": 2,
        "train_detector.model": "padim",
        "train_detector.weights": str(tmp_path / "a.safetensors"),
    }
    assert "ingest.source" not in build_experiments(params, None, ["vae"], [0])["vae", 0].changes


def test_seeds_twice_or_none_and_unknown_detectors_are_refused(repository):
    params = load_params(repository / "params.yaml")
    for seeds in ([], [0, 0]):
        with pytest.raises(ConfigError, match="--seeds takes different whole numbers"):
            build_experiments(params, None, NAMES, seeds)
    with pytest.raises(ConfigError, match=r"--models takes some of feature_autoencoder, .*; got gan$"):
        build_experiments(params, None, ["padim", "gan"], [0])
    with pytest.raises(ConfigError, match=r"--models takes some of .*; got none"):
        build_experiments(params, None, [], [0])


def test_the_built_in_images_must_be_made_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="is not made yet: `loupe run` makes it"):
        list_timed_images(BUILT_IN, "auto")


def test_where_nothing_can_be_fitted_the_sentence_is_the_error():
    with pytest.raises(PipelineError, match=r"^not one detector could be fitted: there is one class$"):
        record_bench({("padim", 0): PipelineError("there is one class"), ("vae", 0): PipelineError("so it is")}, [])


def test_spread_is_that_of_the_library_and_one_value_has_none():
    spread = compute_spread([0.5, 0.7, 0.9])
    assert spread.mean == pytest.approx(np.mean([0.5, 0.7, 0.9]))
    assert spread.deviation == pytest.approx(np.std([0.5, 0.7, 0.9], ddof=1))
    assert (spread.low, spread.high) == (0.5, 0.9)
    assert write_spread(spread) == f"0.7000\n± {statistics.stdev([0.5, 0.7, 0.9]):.4f}"
    assert compute_spread([0.5]).deviation is None
    assert write_spread(compute_spread([0.5])) == "0.5000"


def test_figures_for_machines_have_what_was_fitted_and_what_was_not():
    flat = flatten_bench(build_bench())
    assert flat["feature_autoencoder/test/image_auroc_mean"] == pytest.approx(0.73)
    assert flat["feature_autoencoder/test/image_auroc_deviation"] == pytest.approx(0.02)
    assert flat["padim/test/aupro_low"] < flat["padim/test/aupro_high"]
    assert flat["padim/seed_2/problem"].startswith("too few")
    assert "padim/seed_2/test/aupro" not in flat
    assert [key for key in flat if key.startswith(NAMES[-1])] == [
        f"{NAMES[-1]}/seed_{seed}/problem" for seed in range(3)
    ]
    assert all(isinstance(value, int | float | str) for value in flat.values())


def test_one_seed_has_no_deviation():
    flat = flatten_bench(build_bench(seeds=(5,)))
    assert "feature_autoencoder/test/image_auroc_deviation" not in flat
    assert "±" not in render_bench(build_bench(seeds=(5,))).partition("<main>")[2]


def test_the_table_fits_80_columns():
    console = Console(width=80, record=True, highlight=False)
    console.print(build_table(build_bench()))
    lines = console.export_text().splitlines()
    assert len(lines) == 4 + 2 * (len(NAMES) - 1) + 1
    assert "…" not in "".join(lines)


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_the_window_and_draws_all_that_were_fitted(tmp_path, show, width, scheme):
    save_page(render_bench(build_bench(HOSTILE)), tmp_path / "bench.html")
    page = show(tmp_path / "bench.html", width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("h1").inner_text() == HOSTILE
    (lacking,) = page.locator(".members tbody tr", has=page.locator("th", has_text=re.compile("^vae$"))).all()
    assert lacking.locator("td").all_inner_texts() == ["–"] * 8
    drawing = page.locator(".intervals > svg")
    frame = drawing.bounding_box()
    assert drawing.locator("line.range").count() == drawing.locator(".name").count() == len(NAMES) - 1
    for name in drawing.locator(".name").all():
        assert name.bounding_box()["x"] >= frame["x"]


@pytest.mark.parametrize(("figures", "num_drawn"), [(dict.fromkeys(SCORES, 1.0), len(NAMES) - 1), ({}, 0)])
def test_figures_that_are_all_alike_or_not_known_are_shown_too(figures, num_drawn):
    bench = build_bench()
    members = [replace(member, figures=dict.fromkeys(member.figures, figures)) for member in bench.members]
    page = render_bench(replace(bench, members=members))
    assert page.count('<circle class="mean" cx=') == num_drawn + (num_drawn > 0)  # one in the legend
