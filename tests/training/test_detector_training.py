import numpy as np
import pandas as pd
import pytest
import torch

from loupe.data.loading import PreparedDataset
from loupe.models.detectors.autoencoder import Autoencoder, AutoencoderConfig
from loupe.models.detectors.base import detect
from loupe.models.detectors.denoising_autoencoder import DenoisingAutoencoder, DenoisingConfig
from loupe.models.detectors.vae import Vae, VaeConfig
from loupe.models.files import load_weights
from loupe.training.detector import Reconstruction, train_detector
from loupe.training.trainer import Schedule

NUM_IMAGES = 24
SMALL = (1, 4, 2, (32, 32), (32, 32))
MEMBERS = [
    pytest.param(Autoencoder, AutoencoderConfig(*SMALL), id="autoencoder"),
    pytest.param(Autoencoder, AutoencoderConfig(*SMALL, loss="ssim"), id="autoencoder_ssim"),
    pytest.param(DenoisingAutoencoder, DenoisingConfig(*SMALL), id="denoising_autoencoder"),
    pytest.param(Vae, VaeConfig(*SMALL), id="vae"),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The networks here are so small that threads would mostly wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def ramps():
    """Brighter to the right, more or less, with noise."""
    generator = np.random.default_rng(0)
    images = np.linspace(40, 160, 32) + generator.uniform(-20, 20, (NUM_IMAGES, 1, 1))
    images = images + generator.normal(0, 4, (NUM_IMAGES, 32, 32))
    return PreparedDataset(
        images.clip(0, 255).astype(np.uint8)[..., None],
        np.arange(NUM_IMAGES),
        np.zeros(NUM_IMAGES, np.int64),
        None,
        seed=0,
    )


def train(kind, config, dataset, folder, epochs=3, report=lambda epoch, metrics: None):
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    detector = kind(config)
    recipe = Reconstruction(Schedule(epochs, epochs, "32-true"), 8, 0.01)
    return detector, train_detector(detector, dataset, dataset, recipe, folder, report)


def read_images(dataset):
    return torch.from_numpy(dataset.images).permute(0, 3, 1, 2)


@pytest.mark.parametrize(("kind", "config"), MEMBERS)
def test_each_of_the_family_learns_normal_images(ramps, tmp_path, kind, config):
    detector, history = train(kind, config, ramps, tmp_path, epochs=20)
    losses = history.to_table()["val/loss"]
    assert losses.min() < losses[0]
    turned = read_images(ramps).transpose(2, 3)
    assert detect(detector.eval(), turned)[0].min() > detect(detector, read_images(ramps))[0].max()


@pytest.mark.parametrize(("kind", "config"), MEMBERS)
def test_the_same_seed_gives_the_same_losses(ramps, tmp_path, kind, config):
    tables = [train(kind, config, ramps, tmp_path / name)[1].to_table() for name in "ab"]
    pd.testing.assert_frame_equal(*tables)


@pytest.mark.parametrize(("kind", "config"), MEMBERS)
def test_a_stopped_training_goes_on_and_ends_as_if_it_had_never_stopped(ramps, tmp_path, kind, config):
    def stop(epoch, metrics):
        if epoch == 2:
            raise KeyboardInterrupt

    whole, expected = train(kind, config, ramps, tmp_path / "whole", 4)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(kind, config, ramps, tmp_path / "stopped", 4, stop)
    resumed, history = train(kind, config, ramps, tmp_path / "stopped", 4)
    pd.testing.assert_frame_equal(history.to_table(), expected.to_table())
    for name in ("model.safetensors", "last.safetensors"):
        load_weights(whole, tmp_path / "whole" / name)
        load_weights(resumed, tmp_path / "stopped" / name)
        assert all(torch.equal(one, whole.state_dict()[key]) for key, one in resumed.state_dict().items())


def test_the_parts_of_the_bound_are_in_the_history_and_add_up(ramps, tmp_path):
    table = train(Vae, VaeConfig(*SMALL, beta=2.0, warm_up=0.5), ramps, tmp_path, epochs=4)[1].to_table()
    whole = table["val/reconstruction"] + 2 * table["val/kl"]
    np.testing.assert_allclose(table["val/loss"], whole, rtol=1e-5)
    weights = (table["train/loss"] - table["train/reconstruction"]) / table["train/kl"]
    assert weights[0] < 1 < weights[1] < 2
    np.testing.assert_allclose(weights[2:], 2, rtol=0.01)


def test_a_detector_that_is_ready_to_score_is_trained_all_the_same(ramps, tmp_path):
    detector = Autoencoder(AutoencoderConfig(*SMALL)).eval()
    before = {key: value.clone() for key, value in detector.named_buffers() if "running" in key}
    recipe = Reconstruction(Schedule(1, 1, "32-true"), 8, 0.01)
    train_detector(detector, ramps, ramps, recipe, tmp_path, lambda *_: None)
    after = dict(detector.named_buffers())
    assert before
    assert not any(torch.equal(value, after[key]) for key, value in before.items())


class Watched(Autoencoder):
    """Notes how far the training is, and what is drawn."""

    def __init__(self, config):
        super().__init__(config)
        self.noted = {True: [], False: []}

    def compute_losses(self, images, progress):
        self.noted[self.training].append((progress, float(torch.rand(()))))
        return super().compute_losses(images, progress)


def test_training_draws_anew_in_each_epoch_and_validation_the_same(ramps, tmp_path):
    watched, _ = train(Watched, AutoencoderConfig(*SMALL), ramps, tmp_path, epochs=3)
    drawn = [draw for _, draw in watched.noted[True]]
    assert len(set(drawn)) == len(drawn) == 9
    validations = watched.noted[False]
    assert len(validations) == 3
    assert len(set(validations)) == 1


def test_progress_goes_from_0_to_almost_1_and_validation_is_at_the_end(ramps, tmp_path):
    watched, _ = train(Watched, AutoencoderConfig(*SMALL), ramps, tmp_path, epochs=3)
    assert [progress for progress, _ in watched.noted[True]] == pytest.approx([step / 9 for step in range(9)])
    assert {progress for progress, _ in watched.noted[False]} == {1.0}
