"""The main job itself, on a tiny real part of Fashion-MNIST: the flow, not a mock of it."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess

import numpy as np
import pandas as pd
import pytest
from PIL import Image

TINY = (
    "--set",
    "fetch.fraction=0.01",
    "--set",
    "train_classifier.epochs=1",
    "--set",
    "prepare.classifier.input_size=32",
    "--set",
    "promote.classifier={floor: 0.2, worst_floor: 0.0, margin: 0.0, confidence: 0.95, max_latency_growth: 20.0, "
    "max_size_growth: 4.0}",
    "--set",
    "promote.detector={floor: 0.2, worst_floor: 0.0, margin: 0.0, confidence: 0.95, max_latency_growth: 20.0, "
    "max_size_growth: 4.0}",
)


@pytest.fixture(scope="module")
def first_run(call):
    return call("loupe", "run", *TINY)


@pytest.fixture(scope="module")
def summary(project, first_run):
    assert first_run.returncode == 0, first_run.stdout + first_run.stderr
    return json.loads((project / "reports/summary.json").read_text())


def test_the_run_ends_with_a_table_of_figures_champions_and_reasons(first_run, summary):
    for said in ("accuracy", "image_auroc", "champion", "there was no champion", "make ui"):
        assert said in first_run.stdout
    assert summary["classifier/champion_version"] == summary["detector/champion_version"] == "1"


def test_the_summary_has_the_figures_under_flat_names(summary):
    assert summary["data/layout"] == "split_folders"
    assert summary["classifier/train/num_images"] == 480
    assert summary["classifier/test/num_images"] == 100
    assert summary["detector/test/num_anomalous"] == 90
    for name in ("classifier/test/accuracy", "detector/test/image_auroc"):
        assert 0 <= summary[name] <= 1


def test_the_accuracy_is_that_of_the_predictions_on_disk(project, summary):
    predictions = pd.read_parquet(project / "reports/classifier/predictions.parquet")
    assert summary["classifier/test/accuracy"] == pytest.approx(
        (predictions["label"] == predictions["predicted"]).mean()
    )


def test_the_exported_classifier_agrees_and_stands_beside_the_model(project, summary):
    figures = json.loads((project / "reports/metrics/classifier_export.json").read_text())
    assert figures["classifier/export/agrees"]
    assert figures["classifier/export/num_images"] == summary["classifier/test/num_images"]
    assert (project / "models/exported/classifier/model.onnx").stat().st_size == figures["classifier/export/num_bytes"]


def test_splits_are_disjoint_and_the_given_test_set_is_kept(project, summary):
    manifest = pd.read_parquet(project / "data/ingest/manifest.parquet")
    splits = pd.read_parquet(project / "data/split/splits.parquet")
    assert splits["image_id"].is_unique
    given = set(manifest.loc[manifest["given_split"].eq("test"), "image_id"])
    assert set(splits.loc[splits["split"].eq("test"), "image_id"]) == given


@pytest.mark.parametrize("task", ["classifier", "detector"])
def test_a_model_knows_which_images_had_a_part_in_its_training(project, summary, task):
    index = pd.read_parquet(project / f"data/prepared/{task}/index.parquet")
    seen = pd.read_parquet(project / f"models/{task}/seen.parquet")["image_id"]
    assert set(index["split"]) == {"train", "val", "calibration", "test"}
    assert set(seen) == set(index["image_id"]) - set(index.loc[index["split"].eq("test"), "image_id"])


def test_the_threshold_lets_through_most_calibration_scores(project, summary):
    scores = pd.read_parquet(project / "models/detector/calibration_scores.parquet")["anomaly_score"]
    assert (scores > summary["detector/threshold"]).mean() <= 0.05


def test_the_champions_answer_for_any_number_of_images(project, summary, call):
    program = (
        "import mlflow, pandas as pd, pathlib; mlflow.set_tracking_uri('sqlite:///mlflow.db')\n"
        "files = sorted(pathlib.Path('data/fashion_mnist/images/test').rglob('*.png'))\n"
        "for kind in ('classifier', 'detector'):\n"
        "    model = mlflow.pyfunc.load_model(f'models:/fashion_mnist-{kind}@champion')\n"
        "    for number in (1, 3, 17):\n"
        "        images = pd.DataFrame({'image': [file.read_bytes() for file in files[:number]]})\n"
        "        print('rows', len(model.predict(images)))\n"
    )
    answer = call("python", "-c", program)
    assert [line for line in answer.stdout.splitlines() if line.startswith("rows")] == [
        "rows 1",
        "rows 3",
        "rows 17",
        "rows 1",
        "rows 3",
        "rows 17",
    ]


def test_the_mlflow_run_has_parameters_curves_figures_pictures_data_and_code(project, summary, call):
    program = (
        "import json, mlflow, sys; mlflow.set_tracking_uri('sqlite:///mlflow.db'); client = mlflow.MlflowClient()\n"
        "run = client.get_run(sys.argv[1])\n"
        "pictures = [file.path for file in client.list_artifacts(sys.argv[1], 'pictures')]\n"
        "curve = [(point.step, point.value) for point in client.get_metric_history(sys.argv[1], 'val/loss')]\n"
        "digests = [one.dataset.digest for one in run.inputs.dataset_inputs]\n"
        "data = run.data\n"
        "told = [run.info.status, data.params, data.metrics, data.tags, pictures, curve, digests]\n"
        "print('answer' + json.dumps(told))\n"
    )
    answer = call("python", "-c", program, summary["classifier/run_id"]).stdout.partition("answer")[2]
    status, params, metrics, tags, pictures, curve, digests = json.loads(answer)
    assert status == "FINISHED"
    assert params["train_classifier.backbone"] == "tf_efficientnet_lite0"
    assert metrics["classifier/test/accuracy"] == summary["classifier/test/accuracy"]
    assert [step for step, _ in curve] == [0, 1]
    assert len(tags["git_commit"]) == 40
    assert len(tags["dvc_lock_sha256"]) == 64
    assert {"pictures/confusion.png", "pictures/contact_sheet.png", "pictures/most_wrong.png"} <= set(pictures)
    assert tags["data_digest"].startswith(digests[0])


def test_prefect_keeps_a_task_for_each_stage_and_the_summary(project, summary):
    with sqlite3.connect(project / ".prefect/prefect.db") as database:
        names = {name for (name,) in database.execute("select name from task_run")}
        artifacts = [data for (data,) in database.execute("select data from artifact")]
    assert {"fetch", "ingest", "validate", "export_classifier", "train_detector", "promote"} <= {
        name.rpartition("-")[0] for name in names
    }
    assert any("image_auroc" in artifact for artifact in artifacts)


def test_nothing_is_computed_a_second_time(summary, call):
    again = call("loupe", "run")
    assert again.returncode == 0
    assert "Running stage" not in again.stdout + again.stderr
    status = call("dvc", "status")
    assert "up to date" in status.stdout
    repro = call("dvc", "repro")
    assert "Data and pipelines are up to date" in repro.stdout + repro.stderr


def test_a_better_challenger_is_promoted_and_a_worse_one_kept_out(project, summary, call):
    better = call("loupe", "run", "--set", "train_classifier.epochs=3")
    assert better.returncode == 0
    after = json.loads((project / "reports/summary.json").read_text())
    assert after["classifier/version"] == "2"
    won = after["classifier/decision"] == "promoted"
    assert after["classifier/champion_version"] == ("2" if won else "1")
    assert won == (after["classifier/promotion/difference_low"] > 0)
    assert after["detector/version"] == "1"


def test_a_folder_of_ones_own_is_run_without_the_built_in_set(project, summary, call, tmp_path):
    for name, label in (("train", "good"), ("test", "good"), ("test", "scratch")):
        folder = tmp_path / "tiles" / name / label
        folder.mkdir(parents=True)
        for number in range(30 if name == "train" else 6):
            values = np.random.default_rng((number, len(label), len(name))).integers(90, 110, (40, 48), np.uint8)
            if label == "scratch":
                values[:, 20:24] = 255
            Image.fromarray(values).save(folder / f"{number}.png")
    shutil.rmtree(project / "data/fashion_mnist/images")
    answer = call("loupe", "run", "--data", str(tmp_path / "tiles"))
    assert answer.returncode == 0, answer.stdout + answer.stderr
    after = json.loads((project / "reports/summary.json").read_text())
    assert after["data/layout"] == "mvtec"
    assert "one class to train on" in after["classifier/not_trained_because"]
    assert after["detector/test/image_auroc"] == 1.0
    assert not (project / "data/fashion_mnist/images").exists()


def hear_interruptions():
    """Tests that a shell runs with & have them ignored, and so would what they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_interruption_is_one_sentence_and_leaves_nothing_running(project, summary, environment):
    command = ["loupe", "run", "--set", "seed=7"]
    with subprocess.Popen(
        command, cwd=project, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, preexec_fn=hear_interruptions,
    ) as run:  # fmt: skip
        assert run.stdout is not None
        begun = next(line for line in run.stdout if "Running stage" in line)
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does
        told = run.stdout.read()  # ends when nobody is left who could write
    assert run.returncode == 128 + signal.SIGINT, begun + told
    assert "interrupted: what has ended is kept" in told
    assert "Traceback" not in told
    assert (project / "params.yaml").read_text().count("seed: 7") == 1


def test_critical_findings_stop_the_run_and_name_the_files(project, summary, call, tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / "pets" / label).mkdir(parents=True)
        for number in range(10):
            values = np.random.default_rng((number, ord(label[0]))).integers(0, 255, (40, 48), np.uint8)
            Image.fromarray(values).save(tmp_path / "pets" / label / f"{number}.png")
    shutil.copy(tmp_path / "pets/cat/3.png", tmp_path / "pets/dog/same.png")
    answer = call("loupe", "run", "--data", str(tmp_path / "pets"))
    assert answer.returncode == 1
    (sentence,) = [line for line in answer.stderr.splitlines() if line.startswith("error: ")]
    assert "Every content has one label" in sentence
    assert "cat/3.png" in sentence
    assert "dog/same.png" in sentence
    assert "Traceback" not in answer.stdout + answer.stderr
