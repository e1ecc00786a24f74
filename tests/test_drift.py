"""The drift check: on folders and on tables, with real models in a real registry, and what it says of bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageOps
from rich.console import Console

from loupe.cli import change_params
from loupe.config import load_params
from loupe.data.images import Geometry
from loupe.data.manifest import save_table
from loupe.drift import check_drift
from loupe.drift_report import Images, Report, build_table, describe_verdict
from loupe.errors import DataError, TrackingError
from loupe.evaluation.bootstrap import Interval
from loupe.evaluation.drift import EMBEDDING, SCORE, Comparison, DriftJudgement
from loupe.models.classifiers import ClassifierConfig, build_classifier, save_classifier
from loupe.stages.entry import save_json
from loupe.tracking import logged_models, registry
from loupe.tracking.pyfunc import ImageModel, Options
from loupe.tracking.runs import connect, start_run

NUM_REFERENCE, NUM_RECENT, NUM_VALUES = 40, 30, 5
TINY = {"drift.num_permutations": 199, "drift.num_pictures": 3, "drift.max_images": 45}


def draw_table(num_images, seed, shift=0.0, scores=True):
    generator = np.random.default_rng(seed)
    embeddings = generator.normal(shift, 1, (num_images, NUM_VALUES)).astype(np.float32)
    table = pd.DataFrame({"path": [f"{row}.png" for row in range(num_images)], "embedding": list(embeddings)})
    return table.assign(anomaly_score=generator.normal(shift, 1, num_images)) if scores else table


@pytest.fixture(scope="module")
def project(tmp_path_factory, repository, write):
    """A project with drawn images, whose classifier was logged as training does it, and registered versions beside it.

    pets-detector has a reference, and old-classifier has none; both are folders as MLflow keeps them.
    """
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        (folder / "params.yaml").write_text((repository / "params.yaml").read_text())
        change_params(folder / "params.yaml", TINY)
        files = [write(folder / "images" / f"{number}.png", number, (32, 32)) for number in range(NUM_REFERENCE)]
        listing = {"name": "pets", "source": "images", "layout": "unlabelled"}
        save_json(listing | {"num_images": NUM_REFERENCE, "num_quarantined": 0}, folder / "data/ingest/listing.json")
        client = connect("pets")
        _log_classifier(client, folder / "models/classifier", files)
        plain = {"pets-detector": draw_table(NUM_REFERENCE, 0), "old-classifier": None}
        for name, reference in plain.items():
            model = folder / "stored" / name
            save_json({}, model / "artifacts/model/config.json")
            if reference is not None:
                save_table(reference.assign(image_id="0"), model / "artifacts/model/reference.parquet")
            client.create_registered_model(name)
            version = client.create_model_version(name, model.as_uri()).version
            client.set_registered_model_alias(name, "champion", version)
        yield folder


def _log_classifier(client, folder, files):
    """A random network with the reference that these images give."""
    config = ClassifierConfig("lenet5", ["cat", "dog"], (32, 32), (32, 32), (0.5,) * 3, (0.5,) * 3)
    geometry = Geometry(32, 32, 3, 32, 32, 32, 32, "squash", "bilinear")
    save_classifier(build_classifier(config, "none"), {"geometry": geometry.to_json()}, folder)
    model = ImageModel()
    model.load(folder)
    answers = model.answer([path.read_bytes() for path in files], Options(embeddings=True))
    rows = {"image_id": "0", "path": [path.name for path in files], "embedding": answers["embedding"]}
    save_table(pd.DataFrame(rows), folder / "reference.parquet")
    with start_run("classifier", {}, {}) as run_id:
        uri = logged_models.log_model(folder, files[:2])
    version = registry.register_version(client, "pets-classifier", run_id, uri)
    client.set_registered_model_alias("pets-classifier", "champion", version.version)


@pytest.fixture
def params(project):
    return load_params(project / "params.yaml")


@pytest.fixture
def put(project):
    """Writes a table where `loupe score` might have written it."""

    def put(table, name="scores"):
        path = project / f"{name}.parquet"
        save_table(table, path)
        return path

    return put


def check(params, source, model="champion", images=None):
    """The figures that are left in drift.json."""
    check_drift(params, source, model, images)
    return {name.removeprefix("drift/"): value for name, value in json.loads(open_text("drift.json")).items()}


def open_text(name):
    return (Path("reports") / name).read_text(encoding="utf-8")


def find_run(project):
    client = mlflow.MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("pets").experiment_id
    return client, client.search_runs([experiment], "tags.task = 'drift'", order_by=["start_time DESC"])[0]


def test_a_folder_of_the_same_kind_is_scored_and_has_not_drifted(project, params, write):
    for number in range(NUM_RECENT):
        write(project / "alike" / "deep" / f"{number}.png", 1000 + number, (32, 32))
    (project / "alike" / "broken.png").write_bytes(b"no picture")
    figures = check(params, project / "alike", "pets-classifier@champion")
    assert (figures["is_decided"], figures["is_drifted"]) == (True, False)
    assert (figures["num_recent"], figures["num_reference"], figures["num_unreadable"]) == (30, 40, 1)
    assert figures["embedding/p_value"] > 0.01
    assert figures["model"] == "pets-classifier/1"
    assert "No drift was found" in figures["verdict"]
    assert open_text("drift.html").count("data:image/jpeg") == 2 * 3
    assert len(pd.read_parquet(project / "reports/drift/scores.parquet")) == NUM_RECENT + 1


def test_a_folder_of_inverted_images_has_drifted_and_the_run_says_so(project, params, draw):
    (project / "inverted").mkdir()
    for number in range(NUM_RECENT):
        light = Image.eval(ImageOps.invert(draw(number, (32, 32))), lambda value: 128 + value // 2)
        light.save(project / "inverted" / f"{number}.png")
    figures = check(params, project / "inverted", "pets-classifier/1")
    assert figures["is_drifted"]
    assert figures["embedding/is_drifted"]
    assert figures["embedding/effect_low"] > 0.7
    client, run = find_run(project)
    assert run.info.run_name == "drift"
    assert run.data.tags["verdict"] == figures["verdict"]
    assert run.data.metrics["drift/embedding/p_value"] == figures["embedding/p_value"] == 1 / 200
    assert run.data.metrics["drift/is_drifted"] == 1
    assert run.data.params["drift.num_permutations"] == "199"
    files = {file.path for file in client.list_artifacts(run.info.run_id, "results")}
    assert files == {"results/drift.json", "results/drift.html"}


def test_a_table_with_scores_is_compared_with_the_detectors_reference(params, put):
    figures = check(params, put(draw_table(NUM_RECENT, 1, shift=1.5)))
    assert figures["model"] == "pets-detector/1"
    assert figures["embedding/is_drifted"]
    assert figures["score/is_drifted"]
    assert figures["score/effect"] > 0.75
    assert set(figures) == {
        *("is_drifted", "is_decided", "verdict", "model", "source", "false_alarm_rate"),
        *("num_recent", "num_reference", "num_left_out", "num_unreadable"),
        *("num_recent_groups", "num_reference_groups"),
        *(f"{test}/{name}" for test in ("embedding", "score") for name in ("p_value", "effect", "is_drifted")),
        *(f"{test}/effect_{end}" for test in ("embedding", "score") for end in ("low", "high")),
    }


def test_a_table_of_the_same_kind_has_not_drifted(params, put):
    assert not check(params, put(draw_table(NUM_RECENT, 2)))["is_drifted"]


def test_of_more_images_than_are_compared_the_same_are_drawn_again(project, params, put):
    source = put(draw_table(100, 3, 0.3))
    one, other = check(params, source), check(params, source)
    assert one == other
    assert (one["num_recent"], one["num_reference"], one["num_left_out"]) == (45, 40, 55)
    assert "55 more recent images were not drawn" in open_text("drift.html")


def test_images_that_could_not_be_read_are_left_out(params, put):
    table = draw_table(NUM_RECENT, 4).astype({"embedding": object})
    table.loc[:3, "embedding"] = None
    table.loc[:3, "anomaly_score"] = np.nan
    figures = check(params, put(table))
    assert (figures["num_recent"], figures["num_unreadable"]) == (NUM_RECENT - 4, 4)


def test_of_too_few_images_nothing_is_said_but_that(project, params, put):
    figures = check(params, put(draw_table(19, 5, 9.0)))
    assert (figures["is_decided"], figures["is_drifted"]) == (False, False)
    said = "Too few images to say: there are 19 recent and 40 reference ones that are independent of each other"
    assert figures["verdict"] == f"{said}, and it takes 20 of each (drift.min_images)."
    assert not any(name.startswith(("embedding", "score")) for name in figures)
    assert figures["verdict"] in open_text("drift.html")
    assert find_run(project)[1].data.metrics["drift/is_decided"] == 0


def test_pictures_are_those_that_the_paths_name(project, params, put, write):
    for number in range(NUM_RECENT):
        write(project / "elsewhere" / f"{number}.png", number)
    source = put(draw_table(NUM_RECENT, 6))
    check(params, source, images=project / "elsewhere")
    assert open_text("drift.html").count("data:image/jpeg") == 2 * 3
    check(params, source)
    page = open_text("drift.html")
    assert page.count("data:image/jpeg") == 3  # of the reference alone
    assert page.count("no picture") == 3


def test_images_of_a_group_count_as_one_and_those_of_none_for_themselves(params, put):
    parts = ["a", "b", None] * 10
    figures = check(params, put(draw_table(NUM_RECENT, 10).assign(group=parts)))
    assert (figures["num_recent"], figures["num_recent_groups"], figures["num_reference_groups"]) == (30, 12, 40)
    assert not figures["is_decided"]
    assert "12 recent and 40 reference groups" in open_text("drift.html")


def test_the_reference_has_the_groups_that_its_data_set_gives(project, params, put):
    rows = pd.DataFrame({"image_id": ["0", "1"], "group": ["part", None]})
    save_table(rows, project / "data/ingest/manifest.parquet")
    figures = check(params, put(draw_table(NUM_RECENT, 11)))
    (project / "data/ingest/manifest.parquet").unlink()
    assert figures["num_reference_groups"] == 1  # the stored reference has one image_id for all


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda table: table.drop(columns="embedding"), r"has no column embedding: `loupe score IMAGES --embeddings"),
        (lambda table: table[["anomaly_score"]], "has no column path or embedding"),
        (lambda table: table.assign(embedding=None), "holds no embedding: `loupe score IMAGES --embeddings"),
        (
            lambda table: table.drop(columns="embedding").assign(problem="it is empty"),
            "none of the 30 images of .* could be read: it is empty",
        ),
        (
            lambda table: table.assign(embedding=[[1.0, 2.0]] * 30),
            "have 2 values, and those of pets-detector/1 have 5: score the images by that model",
        ),
        (lambda table: table.assign(embedding=[[1.0] * 5, [2.0] * 4] * 15), "have 4 or 5 values"),
        (lambda table: table.assign(anomaly_score=np.inf), "holds values that are not finite"),
        (
            lambda table: table.assign(detector="pets-detector/7"),
            "was scored by pets-detector/7, and can't be compared",
        ),
    ],
)
def test_a_table_that_is_not_what_it_must_be_is_one_sentence(params, put, change, expected):
    with pytest.raises(DataError, match=expected) as error:
        check_drift(params, put(change(draw_table(30, 7))), "champion", None)
    assert "\n" not in str(error.value)


def test_what_is_no_table_is_one_sentence(project, params):
    with pytest.raises(DataError, match=r"nothing\.parquet does not exist: name a folder of images, or a table"):
        check_drift(params, project / "nothing.parquet", "champion", None)
    with pytest.raises(DataError, match=r"params\.yaml is no Parquet table"):
        check_drift(params, project / "params.yaml", "champion", None)


def test_a_folder_without_a_readable_image_is_one_sentence(params, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the 1 images of .* could be read: .* it is empty"):
        check_drift(params, tmp_path, "pets-classifier@champion", None)


def test_a_model_that_does_not_exist_or_is_too_old_is_one_sentence(params, put):
    source = put(draw_table(30, 8, scores=False))
    with pytest.raises(TrackingError, match="no model pets-classifier@challengers: `loupe promote` makes champions"):
        check_drift(params, source, "challengers", None)
    with pytest.raises(TrackingError, match=r"version 1 of old-classifier has no reference\.parquet to compare with"):
        check_drift(params, source, "old-classifier@champion", None)


def call(project, *arguments):
    program = "from loupe.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, "drift", *map(str, arguments)],
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "80"},
        timeout=300,
    )


def test_the_command_ends_well_where_images_drifted(project, put):
    answer = call(project, put(draw_table(NUM_RECENT, 9, 2.0), "moved"))
    assert answer.returncode == 0, answer.stdout + answer.stderr
    told = answer.stdout.split("30 recent images")[1]
    assert "yes, strongly" in told
    assert "The recent images have drifted: by their embeddings they differ strongly" in told
    assert "reports/drift.html" in told


def test_the_command_ends_with_one_sentence_where_it_cannot_compare(project):
    answer = call(project, project / "nothing.parquet")
    assert answer.returncode == 1
    assert answer.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in answer.stderr


def build_report(params, **comparisons):
    images = Images(draw_table(2, 0), None)
    judgement = DriftJudgement(1234, 567, 1234, 567, comparisons)
    return Report("pets-detector/1", params, images, images, 0, 0, params.drift, judgement)


@pytest.mark.parametrize(
    ("effect", "interval", "said"),
    [
        (0.9, Interval(0.8, 1.0), "their anomaly scores are strongly higher, in 90% of pairs (p = 0.002)"),
        (0.4, Interval(0.3, 0.45), "their anomaly scores are slightly lower, in 60% of pairs (p = 0.002)"),
        (0.52, Interval(0.4, 0.6), "their anomaly scores spread differently, though neither kind scores higher"),
    ],
)
def test_the_verdict_says_by_which_test_and_how_strongly(params, effect, interval, said):
    comparisons = {
        EMBEDDING: Comparison(0.31, 0.55, Interval(0.5, 0.6), False),
        SCORE: Comparison(0.002, effect, interval, True),
    }
    verdict = describe_verdict(build_report(params, **comparisons))
    assert verdict.startswith(
        "The recent images have drifted: their embeddings do not differ clearly more than by chance (p = 0.31);"
    )
    assert said in verdict


def test_the_table_fits_80_columns(params):
    comparisons = {name: Comparison(0.001, 0.7123, Interval(0.701, 0.799), True) for name in (EMBEDDING, SCORE)}
    console = Console(width=80, record=True, highlight=False)
    console.print(build_table(build_report(params, **comparisons)))
    rows = [line for line in console.export_text().splitlines() if "0.701 to 0.799" in line]
    assert len(rows) == 2
    assert all("yes, moderately" in row and "0.712" in row and "0.001" in row for row in rows)
