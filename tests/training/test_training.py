import numpy as np
import pandas as pd
import pytest
import torch

from loupe.data.loading import PreparedDataset
from loupe.models.classifiers import ClassifierConfig, build_classifier, predict_probabilities
from loupe.models.detectors.autoencoder import Autoencoder, AutoencoderConfig, compute_scores
from loupe.models.files import load_weights
from loupe.training.classifier import FineTuning, compute_targets, fine_tune
from loupe.training.detector import Reconstruction, train_autoencoder
from loupe.training.trainer import choose_batch_size, choose_epochs

NUM_IMAGES = 48


@pytest.fixture(scope="module")
def bright_and_dark():
    """Images that anything can tell apart: the second half is brighter."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 100, (NUM_IMAGES, 32, 32, 3), dtype=np.uint8)
    images[NUM_IMAGES // 2 :] += 130
    targets = np.repeat([0, 1], NUM_IMAGES // 2).astype(np.int64)
    return PreparedDataset(images, np.arange(NUM_IMAGES), targets, None, seed=0)


def train_small_classifier(dataset, folder, epochs=2):
    torch.manual_seed(0)
    config = ClassifierConfig("test_efficientnet", ["dark", "bright"], (32, 32), (32, 32), (0.5,) * 3, (0.5,) * 3)
    classifier = build_classifier(config, "none")
    recipe = FineTuning(3, 0.01, epochs, 16, 0.005, 0.01, 0.1, 5, adapts_batch_norm=True)
    seen = []
    folder.mkdir(exist_ok=True)
    history = fine_tune(
        classifier, dataset, dataset, recipe, folder, lambda epoch, metrics: seen.append((epoch, metrics))
    )
    return classifier, history, seen


def test_fine_tuning_learns_what_can_be_learnt(bright_and_dark, tmp_path):
    classifier, _, _ = train_small_classifier(bright_and_dark, tmp_path, epochs=6)
    images = torch.from_numpy(bright_and_dark.images).permute(0, 3, 1, 2)
    predicted = predict_probabilities(classifier.eval(), images).argmax(dim=1)
    assert (predicted == bright_and_dark.targets).float().mean() > 0.9


def test_epochs_of_the_second_phase_count_on_from_the_first(bright_and_dark, tmp_path):
    _, history, seen = train_small_classifier(bright_and_dark, tmp_path)
    assert [epoch for epoch, _ in seen] == [0, 1, 2, 3, 4]
    assert list(history.to_table()["epoch"]) == [0, 1, 2, 3, 4]
    assert all({"train/loss", "val/loss", "val/accuracy", "learning_rate"} <= set(metrics) for _, metrics in seen)


def test_the_best_epoch_is_the_one_with_the_lowest_val_loss_and_its_weights_are_kept(bright_and_dark, tmp_path):
    classifier, history, _ = train_small_classifier(bright_and_dark, tmp_path)
    assert history.best_epoch == history.to_table()["val/loss"].argmin()
    kept = {key: value.clone() for key, value in classifier.state_dict().items()}
    load_weights(classifier, tmp_path / "model.safetensors")
    assert all(torch.equal(kept[key], value) for key, value in classifier.state_dict().items())
    assert (tmp_path / "last.safetensors").exists()


def test_the_same_seed_gives_the_same_losses(bright_and_dark, tmp_path):
    _, first, _ = train_small_classifier(bright_and_dark, tmp_path / "a")
    _, second, _ = train_small_classifier(bright_and_dark, tmp_path / "b")
    pd.testing.assert_frame_equal(first.to_table(), second.to_table())


def test_without_a_second_phase_the_backbone_stays_as_it_was(bright_and_dark, tmp_path):
    torch.manual_seed(0)
    config = ClassifierConfig("test_efficientnet", ["dark", "bright"], (32, 32), (32, 32), (0.5,) * 3, (0.5,) * 3)
    untouched = build_classifier(config, "none")
    classifier, _, _ = train_small_classifier(bright_and_dark, tmp_path, epochs=0)
    heads = {name for name, _ in classifier.named_parameters() if "classifier" in name}
    before, after = untouched.state_dict(), classifier.state_dict()
    assert {key for key in after if not torch.equal(before[key], after[key])} == heads


def test_pretrained_statistics_stay_where_batch_norm_must_not_adapt(bright_and_dark, tmp_path):
    config = ClassifierConfig("test_efficientnet", ["dark", "bright"], (32, 32), (32, 32), (0.5,) * 3, (0.5,) * 3)
    classifier = build_classifier(config, "none")
    before = {key: value.clone() for key, value in classifier.named_buffers() if "running" in key}
    recipe = FineTuning(1, 0.01, 1, 16, 0.005, 0.01, 0.1, 5, adapts_batch_norm=False)
    fine_tune(classifier, bright_and_dark, bright_and_dark, recipe, tmp_path, lambda *_: None)
    load_weights(classifier, tmp_path / "last.safetensors")
    after = dict(classifier.named_buffers())
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_an_autoencoder_scores_what_it_never_saw_higher(bright_and_dark, tmp_path):
    torch.manual_seed(0)
    half = NUM_IMAGES // 2
    dark = PreparedDataset(bright_and_dark.images, np.arange(half), np.zeros(half, np.int64), None, seed=0)
    autoencoder = Autoencoder(AutoencoderConfig(3, 4, 2, (32, 32), (32, 32)))
    train_autoencoder(autoencoder, dark, dark, Reconstruction(8, 8, 0.01, 8), tmp_path, lambda *_: None)
    scores = compute_scores(autoencoder.eval(), torch.from_numpy(bright_and_dark.images).permute(0, 3, 1, 2))
    assert scores[half:].min() > scores[:half].max()


def test_lightning_tells_the_sampler_each_epoch_so_that_none_augments_like_another(bright_and_dark, tmp_path):
    epochs = []

    class Watched(PreparedDataset):
        def __getitems__(self, keys):
            epochs.append({epoch for epoch, _ in keys})
            return super().__getitems__(keys)

    watched = Watched(bright_and_dark.images, bright_and_dark.rows, np.zeros(NUM_IMAGES, np.int64), None, seed=0)
    autoencoder = Autoencoder(AutoencoderConfig(3, 4, 2, (32, 32), (32, 32)))
    train_autoencoder(autoencoder, watched, bright_and_dark, Reconstruction(3, 24, 0.01, 8), tmp_path, lambda *_: None)
    assert epochs == [{0}, {0}, {1}, {1}, {2}, {2}]


def test_epochs_are_as_many_as_the_budget_allows(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_epochs(100, 1000, 1e6, least=2, most=20) == 10
    assert choose_epochs(100_000, 1000, 1e6, least=2, most=20) == 2
    assert choose_epochs(1, 1000, 1e6, least=2, most=20) == 20


def test_a_gpu_gets_more_epochs_and_larger_batches(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_epochs(1000, 1000, 1e6, least=2, most=20) == 20
    assert choose_batch_size(50_000) == 256


def test_targets_are_positions_in_the_order_of_classes():
    assert list(compute_targets(np.array(["b", "a", "b"]), ["a", "b"])) == [1, 0, 1]
