"""`loupe reconstruct`: pictures and latent vectors of a detector that is trained, or one sentence."""

import json

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from loupe.cli import app
from loupe.data.images import Geometry
from loupe.data.prepare import prepare_images
from loupe.errors import ConfigError, DataError
from loupe.models.detectors.autoencoder import Autoencoder, AutoencoderConfig
from loupe.models.detectors.base import save_detector
from loupe.models.detectors.denoising_autoencoder import DenoisingAutoencoder, DenoisingConfig
from loupe.models.detectors.family import build_detector
from loupe.models.detectors.features import FeatureConfig
from loupe.models.detectors.vae import Vae, VaeConfig
from loupe.reconstruction import rebuild

GEOMETRY = Geometry(20, 24, 3, 20, 24, 32, 40, "squash", "bilinear")
SMALL = (3, 4, 2, (20, 24), (32, 40))
EXTRA = {"geometry": GEOMETRY.to_json(), "normal_label": "good", "threshold": 0.1}


@pytest.fixture
def project(tmp_path, monkeypatch, write):
    """A folder with a trained autoencoder, and prepared test images: ten good, four scratched, two bent."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_detector(Autoencoder(AutoencoderConfig(*SMALL)), EXTRA, tmp_path / "models/detector")
    labels = ["good"] * 12 + ["scratch"] * 4 + ["dent"] * 2
    for number in range(len(labels)):
        write(tmp_path / "images" / f"{number:02d}.png", number)
    rows = pd.DataFrame(
        {
            "image_id": [f"{number:02d}" for number in range(len(labels))],
            "label": labels,
            "split": ["train"] * 2 + ["test"] * 16,
            "path": [f"{number:02d}.png" for number in range(len(labels))],
            "num_bytes": 100,
            "mask_path": pd.Series([None] * len(labels), dtype="str"),
        }
    )
    prepare_images(tmp_path / "images", rows, GEOMETRY, tmp_path / "data/prepared/detector")
    return tmp_path


def call(*arguments):
    answer = CliRunner().invoke(app, ["reconstruct", *map(str, arguments)], catch_exceptions=False)
    assert answer.exit_code == 0
    return answer.output.split()


def test_test_images_are_shown_where_none_are_given(project):
    assert call() == ["written:", "reports/reconstructions.png"]
    picture = matplotlib.image.imread(project / "reports/reconstructions.png")
    assert picture.shape[1] > 8 * 100  # eight columns
    assert [path.name for path in (project / "reports").iterdir()] == ["reconstructions.png"]


def test_the_same_picture_comes_out_each_time(project):
    detector = DenoisingAutoencoder(DenoisingConfig(*SMALL))
    save_detector(detector, EXTRA, project / "models/detector")
    for name in ("a.png", "b.png"):
        call("--out", name)
    assert (project / "a.png").read_bytes() == (project / "b.png").read_bytes()


def test_latents_of_all_test_images_are_the_codes(project):
    call("--latents", "latents.parquet")
    table = pd.read_parquet(project / "latents.parquet")
    assert list(table.columns) == ["image", "label", "latent"]
    assert table["label"].value_counts().to_dict() == {"good": 10, "scratch": 4, "dent": 2}
    assert {len(latent) for latent in table["latent"]} == {2 * 4 * 5}


@pytest.mark.parametrize(("kind", "config"), [(Vae, VaeConfig(*SMALL)), (Autoencoder, AutoencoderConfig(*SMALL))])
def test_given_files_go_the_way_of_the_models_geometry(project, kind, config):
    torch.manual_seed(1)
    detector = kind(config).eval()
    save_detector(detector, EXTRA, project / "models/detector")
    written = call("images", "--out", "shown/of_files.png", "--latents", "latents.parquet")
    assert written == ["written:", "latents.parquet", "written:", "shown/of_files.png"]
    table = pd.read_parquet(project / "latents.parquet")
    assert list(table["image"]) == [f"images/{number:02d}.png" for number in range(18)]
    pixels = torch.from_numpy(np.load(project / "data/prepared/detector/images.npy")).permute(0, 3, 1, 2)
    expected = detector.embed(pixels).detach().numpy()
    np.testing.assert_allclose(np.stack(table["latent"].tolist()), expected, rtol=0, atol=1e-5)


def test_one_image_alone_will_do(project):
    call("images/03.png", "--out", "one.png", "--latents", "one.parquet")
    assert (project / "one.png").exists()
    assert list(pd.read_parquet(project / "one.parquet")["image"]) == ["images/03.png"]


def test_a_denoising_one_shows_what_it_was_trained_on_too():
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, 20, 24), dtype=torch.uint8)
    denoising = rebuild(DenoisingAutoencoder(DenoisingConfig(*SMALL)).eval(), pixels)
    assert list(denoising) == ["original", "corrupted", "corrupted, rebuilt", "reconstruction"]
    assert (denoising["corrupted"] != denoising["original"]).mean() > 0.5
    assert all(images.shape == (2, 32, 40, 3) for images in denoising.values())
    assert list(rebuild(Autoencoder(AutoencoderConfig(*SMALL)).eval(), pixels)) == ["original", "reconstruction"]


def save_feature_detector(folder):
    config = FeatureConfig("test_resnet", (20, 24), (64, 64), (0.5,) * 3, (0.5,) * 3)
    save_detector(build_detector("knn_patches", config, "none"), EXTRA, folder / "models/detector")


def test_a_detector_of_features_has_latents_and_no_reconstructions(project):
    save_feature_detector(project)
    with pytest.raises(ConfigError, match="knn_patches, rebuilds no whole images: train an autoencoder of pixels"):
        call()
    assert call("--latents", "latents.parquet") == ["written:", "latents.parquet"]
    assert len(pd.read_parquet(project / "latents.parquet")) == 16


def forget(project):
    (project / "models/detector/config.json").unlink()


def skip(project):
    forget(project)
    (project / "models/detector/skipped.json").write_text(json.dumps({"reason": "no normal images"}))


def forget_images(project):
    (project / "data/prepared/detector/images.npy").unlink()


def prepare_otherwise(project):
    path = project / "data/prepared/detector/geometry.json"
    path.write_text(json.dumps({**GEOMETRY.to_json(), "input_height": 64}))


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (forget, ConfigError, "models/detector holds no trained detector: `make run` trains one"),
        (skip, ConfigError, "models/detector/skipped.json says why"),
        (forget_images, DataError, "data/prepared/detector holds no images: name an image"),
        (prepare_otherwise, DataError, "prepared for another detector: train it by `make run`"),
    ],
)
def test_what_is_not_there_is_said_in_one_sentence(project, spoil, error, said):
    spoil(project)
    with pytest.raises(error, match=said):
        call()
    assert not (project / "reports").exists()


@pytest.mark.parametrize(("source", "said"), [("nowhere", "does not exist"), ("notes.png", "can't be decoded")])
def test_what_is_no_image_is_said_in_one_sentence(project, source, said):
    (project / "notes.png").write_text("no image")
    with pytest.raises(DataError, match=said):
        call(source)
