import json
import math
import os
import socket
import subprocess
import sys
import time
from base64 import b64encode
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import requests
import torch
from PIL import Image

from loupe.data.images import Geometry, fit_image, open_image
from loupe.data.manifest import save_table
from loupe.errors import ConfigError, DataError, TrackingError
from loupe.models.classifiers import ClassifierConfig, build_classifier, save_classifier
from loupe.models.detectors.autoencoder import Autoencoder, AutoencoderConfig
from loupe.models.detectors.base import detect, save_detector
from loupe.models.detectors.family import load_detector
from loupe.models.export import ExportedModel, export_detector
from loupe.scoring import Request, list_source, score_images
from loupe.tracking import logged_models, registry
from loupe.tracking.pyfunc import ImageModel, Options
from loupe.tracking.runs import connect, start_run

GEOMETRY = Geometry(32, 32, 3, 32, 32, 32, 32, "squash", "bilinear")
NUM_IMAGES = 7
TOLERANCE = 1e-4  # between torch, ONNX, batches and HTTP; scores here are about 0.1


@pytest.fixture(scope="module")
def images(tmp_path_factory, write):
    """Seven images in two folders, one broken, one text file."""
    folder = tmp_path_factory.mktemp("recent")
    for number in range(NUM_IMAGES):
        write(folder / ("a" if number < 4 else "b") / f"{number}.png", number)
    (folder / "b" / "broken.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("not an image, and not said to be one")
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory, images):
    """A registry with a classifier and a detector, both champions of the data set `pets`."""
    folder = tmp_path_factory.mktemp("project")
    torch.manual_seed(0)
    config = ClassifierConfig("lenet5", ["cat", "dog"], (32, 32), (32, 32), (0.5,) * 3, (0.5,) * 3)
    save_classifier(build_classifier(config, "none"), {"geometry": GEOMETRY.to_json()}, folder / "models/classifier")
    detector = Autoencoder(AutoencoderConfig(3, 4, 2, (32, 32), (32, 32))).eval()
    extra = {"geometry": GEOMETRY.to_json(), "threshold": 0.05, "map_scale": {"low": 0.0, "high": 0.2}}
    save_detector(detector, extra, folder / "models/detector")
    calibration = pd.DataFrame({"image_id": list("abcdefghi"), "anomaly_score": np.arange(1, 10) / 50})
    save_table(calibration, folder / "models/detector/calibration_scores.parquet")
    listing = {"name": "pets", "source": str(images), "layout": "class_folders", "num_images": 7, "num_quarantined": 0}
    (folder / "data/ingest").mkdir(parents=True)
    (folder / "data/ingest/listing.json").write_text(json.dumps(listing))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        client = connect("pets")
        for task in ("classifier", "detector"):
            with start_run(task, {}, {}) as run_id:
                uri = logged_models.log_model(folder / "models" / task, sorted((images / "a").iterdir())[:2])
            version = registry.register_version(client, f"pets-{task}", run_id, uri)
            client.set_registered_model_alias(version.name, "champion", version.version)
        yield folder


def score(store, source, out="scores.parquet", model="champion", **options):
    scored = score_images(Request(source, model, store / out, **options))
    return scored, pd.read_csv(scored.table) if scored.table.suffix == ".csv" else pd.read_parquet(scored.table)


def test_a_folder_becomes_a_row_an_image_and_a_broken_one_a_row_with_its_reason(store, images):
    scored, table = score(store, images)
    assert (scored.num_images, scored.num_unreadable) == (NUM_IMAGES + 1, 1)
    assert list(table["path"]) == [f"a/{n}.png" for n in range(4)] + [f"b/{n}.png" for n in range(4, 7)] + [
        "b/broken.png"
    ]
    assert list(table["problem"].isna()) == [True] * NUM_IMAGES + [False]
    assert "it is none of PNG" in table["problem"].iloc[-1]
    assert table[["predicted", "probability_cat", "anomaly_score", "is_anomalous"]].iloc[-1].isna().all()
    good = table.iloc[:-1]
    np.testing.assert_allclose(good["probability_cat"] + good["probability_dog"], 1, rtol=1e-6)
    assert list(good["is_anomalous"]) == list(good["anomaly_score"] > 0.05)
    assert scored.num_anomalous == good["is_anomalous"].sum()
    assert set(table["classifier"]) == {"pets-classifier/1"}
    assert set(table["detector"]) == {"pets-detector/1"}
    assert list(table.columns[-2:]) == ["detector", "problem"]
    assert not (store / "scores.parquet.parts").exists()


def test_one_file_and_a_table_are_scored_as_the_folder_is(store, images, tmp_path):
    _, table = score(store, images)
    _, one = score(store, images / "b" / "5.png", "one.csv")
    row = table.set_index("path").loc["b/5.png"]
    assert list(one["path"]) == ["5.png"]
    assert one["anomaly_score"].item() == pytest.approx(row["anomaly_score"], abs=1e-7)
    listing = images / "wanted.csv"
    listing.write_text("path,shift\nb/5.png,night\nb/gone.png,day\n")
    _, listed = score(store, listing, "listed.parquet", "pets-detector/1")
    listing.unlink()
    assert listed["anomaly_score"].iloc[0] == pytest.approx(row["anomaly_score"], abs=1e-7)
    assert listed["problem"].isna().tolist() == [True, False]
    assert listed["problem"].iloc[1] == "the file can't be read: No such file or directory"
    assert "predicted" not in listed


def test_a_stopped_run_goes_on_and_ends_with_the_same_table(store, images, monkeypatch):
    expected = score(store, images)[1]
    monkeypatch.setattr("loupe.scoring.PART_SIZE", 3)
    answered = []
    plain = ImageModel.answer

    def stop_at_the_third(model, contents, options):
        answered.append(len(contents))
        if len(answered) == 4:
            raise KeyboardInterrupt
        return plain(model, contents, options)

    monkeypatch.setattr(ImageModel, "answer", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        score(store, images)
    assert sorted(path.name for path in (store / "scores.parquet.parts").glob("*.parquet")) == ["000000.parquet"]
    _, table = score(store, images)
    assert answered[4:] == [3, 3, 2, 2]  # both models, and not the first part again
    pd.testing.assert_frame_equal(table, expected, rtol=1e-6)
    assert not (store / "scores.parquet.parts").exists()


def test_parts_of_images_that_have_changed_since_are_not_gone_on_from(store, write, tmp_path, monkeypatch):
    for number in range(4):
        write(tmp_path / f"{number}.png", number)
    before = score(store, tmp_path)[1]
    monkeypatch.setattr("loupe.scoring.PART_SIZE", 2)
    with monkeypatch.context() as patch:
        patch.setattr("loupe.scoring._join", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            score(store, tmp_path)
    write(tmp_path / "0.png", 50)
    after = score(store, tmp_path)[1]
    assert (after["anomaly_score"] != before["anomaly_score"]).tolist() == [True, False, False, False]


def test_parts_of_another_request_are_not_gone_on_from(store, images, monkeypatch):
    parts = store / "scores.parquet.parts"
    parts.mkdir()
    (parts / "request.json").write_text('{"model": "challenger"}')
    pd.DataFrame({"path": ["wrong"]}).to_parquet(parts / "000000.parquet")
    _, table = score(store, images)
    assert "wrong" not in set(table["path"])


def test_another_threshold_needs_no_training(store, images):
    scores = score(store, images)[1]["anomaly_score"]
    _, by_value = score(store, images, threshold=float(scores.median()))
    assert by_value["is_anomalous"].sum() == (scores > scores.median()).sum()
    _, by_rate = score(store, images, false_alarm_rate=0.2)
    assert by_rate["threshold"].iloc[0] == 8 / 50  # the second largest of nine normal scores: 2/10 above it
    with pytest.raises(ConfigError, match="takes at least 99 normal calibration images"):
        score(store, images, false_alarm_rate=0.01)


def test_embeddings_and_maps_are_written_where_they_are_asked_for(store, images):
    _, table = score(store, images, embeddings=True, maps=store / "maps")
    assert {len(values) for values in table["embedding"].iloc[:-1]} == {2 * 4 * 4}
    assert table["embedding"].isna().tolist() == [False] * NUM_IMAGES + [True]
    assert "anomaly_map" not in table
    drawn = sorted(path.relative_to(store / "maps").as_posix() for path in (store / "maps").rglob("*.*"))
    assert drawn == [f"{path}.png" for path in table["path"].iloc[:-1]]
    with Image.open(store / "maps" / drawn[0]) as picture:
        assert picture.size == (192, 192)  # small images are enlarged, for the eye


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"out": "scores.txt"}, ConfigError, "must end in .parquet or .csv"),
        ({"out": "scores.csv", "embeddings": True}, ConfigError, "CSV has no place for"),
        ({"threshold": 1.0, "false_alarm_rate": 0.1}, ConfigError, "give one of them"),
        ({"threshold": float("nan")}, ConfigError, "nan is none"),
        ({"model": "winner"}, TrackingError, "no model pets-classifier@winner or pets-detector@winner"),
        ({"model": "pets-detector/77"}, TrackingError, "no model pets-detector/77"),
        ({"model": "pets-classifier/1", "maps": Path("maps")}, ConfigError, "heat maps are a detector's"),
    ],
)
def test_what_does_not_go_together_is_one_sentence_and_nothing_is_written(store, images, options, error, sentence):
    before = sorted(store.glob("scores*"))
    with pytest.raises(error, match=sentence):
        score(store, images, **options)
    assert sorted(store.glob("scores*")) == before


@pytest.mark.parametrize("content", [b"", b'path\n"a.png\n', b"path\n\xe9.png\n"])
def test_a_table_that_can_not_be_read_is_one_sentence(store, tmp_path, content):
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"list\.csv can't be read as a table"):
        score(store, tmp_path / "list.csv")


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1])
def test_a_rate_that_is_none_is_one_sentence(store, images, rate):
    with pytest.raises(ConfigError, match="must lie between 0 and 1"):
        score(store, images, false_alarm_rate=rate)


def test_maps_stay_in_their_folder_whatever_a_table_calls_its_images(store, write, tmp_path):
    write(tmp_path / "in" / "...." / "0.png", 1)
    write(tmp_path / "outside.png", 2)
    (tmp_path / "in" / "list.csv").write_text("path\n....//0.png\n../outside.png\n")
    score(store, tmp_path / "in" / "list.csv", maps=tmp_path / "maps")
    written = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png.png"))
    assert written == ["maps/..../0.png.png", "maps/outside.png.png"]


def test_text_is_never_taken_for_the_path_of_a_file(store, images):
    model = ImageModel()
    model.load(store / "models/classifier")
    path = str(images / "a/0.png")
    answers = model.predict(None, pd.DataFrame({"image": [path, None, (images / "a/0.png").read_bytes()]}))
    assert answers["problem"].str.startswith("the image is no bytes").tolist()[:2] == [True, True]
    assert answers["problem"].isna().tolist() == [False, False, True]
    assert path not in answers["problem"][0]
    assert len(model.answer([], Options())) == 0


def test_nothing_to_score_is_said(tmp_path):
    with pytest.raises(DataError, match="names no images"):
        list_source(tmp_path)
    (tmp_path / "list.csv").write_text("file\na.png\n")
    with pytest.raises(DataError, match="has no column `path`, but file"):
        list_source(tmp_path / "list.csv")
    with pytest.raises(DataError, match="does not exist"):
        list_source(tmp_path / "gone")


def test_a_table_keeps_its_groups(store, images):
    paths = ["a/0.png", "a/1.png", "b/4.png"]
    pd.DataFrame({"path": paths, "group": ["part 1", "part 1", None], "note": "x"}).to_csv(
        images / "parts.csv", index=False
    )
    try:
        _, table = score(store, images / "parts.csv")
    finally:
        (images / "parts.csv").unlink()
    assert table["path"].tolist() == paths
    assert table["group"].tolist()[:2] == ["part 1"] * 2
    assert pd.isna(table["group"][2])
    assert "note" not in table


@pytest.fixture(scope="module")
def server(store):
    """MLflow's own server of the detector's champion, on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["mlflow", "models", "serve", "--model-uri", "models:/pets-detector@champion", "--env-manager", "local"]
    binaries = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    log = (store / "server.log").open("w")
    process = subprocess.Popen(
        [str(binaries / command[0]), *command[1:], "--host", "127.0.0.1", "--port", str(port)],
        env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, (store / "server.log").read_text()
            try:
                requests.get(f"{address}/ping", timeout=5).raise_for_status()
                break
            except requests.RequestException:
                time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, 15)
        process.wait()
        log.close()


def ask(address, contents, **params):
    records = [{"image": b64encode(content).decode()} for content in contents]
    body = {"dataframe_records": records, "params": params}
    answer = requests.post(f"{address}/invocations", json=body, timeout=60)
    answer.raise_for_status()
    assert "NaN" not in answer.text  # which is no JSON
    return pd.DataFrame(answer.json()["predictions"])


def test_http_batch_torch_and_onnx_give_the_same_scores(store, images, server):
    _, table = score(store, images)
    paths = [images / path for path in table["path"]]
    by_http = ask(server, [path.read_bytes() for path in paths])
    detector = load_detector(store / "models/detector")
    prepared = np.stack([fit_image(open_image(path), GEOMETRY) for path in paths[:-1]]).transpose(0, 3, 1, 2).copy()
    by_torch, _ = detect(detector, torch.from_numpy(prepared))
    export_detector(detector, torch.from_numpy(prepared[:2]), store / "model.onnx", GEOMETRY.to_json(), 0.05)
    by_onnx, _ = ExportedModel(store / "model.onnx").run(prepared)
    expected = table["anomaly_score"].iloc[:-1].to_numpy()
    for scores in (by_http["anomaly_score"].iloc[:-1].astype(float), by_torch.numpy(), by_onnx):
        np.testing.assert_allclose(scores, expected, rtol=0, atol=TOLERANCE)
    assert by_http["is_anomalous"].iloc[:-1].tolist() == table["is_anomalous"].iloc[:-1].tolist()
    assert by_http.iloc[-1]["anomaly_score"] is None or np.isnan(by_http.iloc[-1]["anomaly_score"])
    assert "it is none of PNG" in by_http.iloc[-1]["problem"]


def test_http_takes_another_rate_and_gives_maps(images, server):
    answer = ask(server, [(images / "a/0.png").read_bytes()], false_alarm_rate=0.2, maps=True)
    assert answer["threshold"].item() == 8 / 50
    assert np.shape(answer["anomaly_map"].item()) == (32, 32)


@pytest.mark.parametrize("params", [{"threshold": math.nan}, {"threshold": 5.0, "false_alarm_rate": 0.1}])
def test_a_served_model_refuses_what_does_not_go_together(params):
    with pytest.raises(ConfigError, match=r"nan is none|give one of them"):
        ImageModel().predict(None, pd.DataFrame({"image": [b""]}), params)


def test_a_network_that_takes_no_empty_batch_answers_to_broken_files_alone(tmp_path):
    config = ClassifierConfig("swin_tiny_patch4_window7_224", ["cat", "dog"], *[(32, 32)] * 2, (0.5,) * 3, (0.5,) * 3)
    save_classifier(build_classifier(config, "none"), {"geometry": GEOMETRY.to_json()}, tmp_path)
    model = ImageModel()
    model.load(tmp_path)
    answers = model.answer([b"broken"], Options(embeddings=True))
    assert answers["problem"].str.contains("it is none of PNG").all()
    assert answers.drop(columns="problem").isna().all(axis=None)
    assert {"predicted", "probability_cat", "embedding"} < set(answers)
