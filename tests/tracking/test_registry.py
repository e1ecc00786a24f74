import mlflow
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from loupe.data.images import Geometry
from loupe.models.classifiers import ClassifierConfig, build_classifier, save_classifier
from loupe.models.detectors.autoencoder import Autoencoder, AutoencoderConfig
from loupe.models.detectors.base import save_detector
from loupe.tracking import logged_models, registry
from loupe.tracking.runs import connect, start_run

GEOMETRY = Geometry(32, 32, 3, 32, 32, 32, 32, "squash", "bilinear")


@pytest.fixture
def client(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    return connect("images")


@pytest.fixture
def image_files(tmp_path):
    generator = np.random.default_rng(0)
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for path in paths:
        Image.fromarray(generator.integers(0, 255, (40, 50, 3), np.uint8)).save(path)
    return paths


def save_small_classifier(folder):
    config = ClassifierConfig("test_efficientnet", ["cat", "dog"], (32, 32), (32, 32), (0.5,) * 3, (0.5,) * 3)
    save_classifier(build_classifier(config, "none"), {"geometry": GEOMETRY.to_json()}, folder)
    return folder


def save_small_detector(folder):
    autoencoder = Autoencoder(AutoencoderConfig(3, 4, 2, (32, 32), (32, 32)))
    save_detector(autoencoder, {"geometry": GEOMETRY.to_json(), "threshold": 0.05}, folder)
    return folder


def register(client, folder, examples, name):
    with start_run("training", {}, {}) as run_id:
        model_uri = logged_models.log_model(folder, examples)
    return registry.register_version(client, name, run_id, model_uri)


@pytest.mark.parametrize("save", [save_small_classifier, save_small_detector])
def test_a_champion_loads_by_its_alias_and_takes_any_number_of_images(client, image_files, tmp_path, save):
    version = register(client, save(tmp_path / "model"), image_files, "images-model")
    client.set_registered_model_alias(version.name, registry.CHAMPION, version.version)
    model = mlflow.pyfunc.load_model("models:/images-model@champion")
    content = image_files[0].read_bytes()
    answers = [model.predict(pd.DataFrame({"image": [content] * number})) for number in (1, 3, 17)]
    assert [len(answer) for answer in answers] == [1, 3, 17]
    numbers = answers[2].select_dtypes("number")
    np.testing.assert_allclose(numbers.iloc[[0] * 17], numbers, atol=1e-6)


def test_images_of_different_sizes_and_modes_are_scored_together(client, image_files, tmp_path):
    version = register(client, save_small_detector(tmp_path / "model"), image_files, "images-detector")
    grey = tmp_path / "grey.png"
    Image.new("L", (7, 90), 128).save(grey)
    assert len(logged_models.predict_with(version, [*image_files, grey])) == 3


def test_no_pickle_is_written(client, image_files, tmp_path):
    register(client, save_small_classifier(tmp_path / "model"), image_files, "images-classifier")
    written = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert written.isdisjoint({".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib"})


def test_a_new_version_is_challenger_and_the_same_run_is_not_registered_twice(client, image_files, tmp_path):
    version = register(client, save_small_detector(tmp_path / "model"), image_files, "images-detector")
    model_uri = f"models:/{version.model_id}"
    again = registry.register_version(client, "images-detector", version.run_id, model_uri)
    assert again.version == version.version
    assert client.get_model_version_by_alias("images-detector", "challenger").version == version.version
    assert registry.find_champion(client, "images-detector") is None


def test_a_newer_version_takes_the_challengers_place(client, image_files, tmp_path):
    folder = save_small_detector(tmp_path / "model")
    first = register(client, folder, image_files, "images-detector")
    second = register(client, folder, image_files, "images-detector")
    assert (str(first.version), str(second.version)) == ("1", "2")
    assert client.get_model_version_by_alias("images-detector", "challenger").version == second.version


def test_a_version_that_does_not_exist_is_none(client, image_files, tmp_path):
    version = register(client, save_small_detector(tmp_path / "model"), image_files, "images-detector")
    assert registry.find_version(client, "images-detector", version.version).run_id == version.run_id
    assert registry.find_version(client, "images-detector", "7") is None


def test_size_is_that_of_the_folder_that_training_wrote_and_latency_is_of_each_model(client, image_files, tmp_path):
    folder = save_small_classifier(tmp_path / "model")
    version = register(client, folder, image_files, "images-classifier")
    loaded = [logged_models.load_model(uri) for uri in (version.source, "models:/images-classifier/1")]
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert [model.num_bytes for model in loaded] == [num_bytes] * 2
    latencies = logged_models.measure_latencies(loaded, image_files)
    assert len(latencies) == 2
    assert all(latency > 0 for latency in latencies)


def test_logged_model_answers_as_the_model_in_memory(client, image_files, tmp_path):
    import torch

    from loupe.data.images import fit_image, open_image
    from loupe.models.classifiers import load_classifier, predict_probabilities

    folder = save_small_classifier(tmp_path / "model")
    version = register(client, folder, image_files, "images-classifier")
    images = np.stack([fit_image(open_image(path), GEOMETRY) for path in image_files])
    expected = predict_probabilities(load_classifier(folder), torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    answer = logged_models.predict_with(version, image_files)
    np.testing.assert_allclose(answer[["probability_cat", "probability_dog"]].to_numpy(), expected, atol=1e-6)


def test_a_file_that_is_no_image_is_a_row_with_its_reason(client, image_files, tmp_path):
    version = register(client, save_small_detector(tmp_path / "model"), image_files, "images-detector")
    model = mlflow.pyfunc.load_model(f"models:/images-detector/{version.version}")
    answer = model.predict(pd.DataFrame({"image": [b"text", image_files[0].read_bytes()]}))
    assert "it is none of PNG" in answer["problem"][0]
    assert answer["anomaly_score"].isna().tolist() == [True, False]
