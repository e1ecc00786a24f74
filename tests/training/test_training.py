from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from pytorch_lightning import Trainer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from loupe.data.loading import PreparedDataset
from loupe.data.transforms import build_augmentation
from loupe.errors import ConfigError
from loupe.models.classifiers import ClassifierConfig, build_classifier, predict_probabilities
from loupe.models.detectors.autoencoder import Autoencoder, AutoencoderConfig
from loupe.models.detectors.base import detect
from loupe.models.files import load_weights, save_weights
from loupe.models.optimization import build_optimizer, check_optimizer, freeze_layers
from loupe.models.preprocess import Preprocess
from loupe.training.checkpoints import SafetensorsIO, read_epoch
from loupe.training.classifier import (
    RECIPES,
    ClassifierTraining,
    Recipe,
    has_learnt_from_val,
    is_refitted,
    refit,
    train_head,
    train_network,
    train_whole,
)
from loupe.training.detector import Reconstruction, train_detector
from loupe.training.head import JUDGED_BY, compute_features
from loupe.training.trainer import History, Schedule, build_one_cycle, choose_batch_size, choose_epochs

NUM_IMAGES = 48


@pytest.fixture(scope="module")
def bright_and_dark():
    """Images that anything can tell apart: the second half is brighter."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 100, (NUM_IMAGES, 32, 32, 3), dtype=np.uint8)
    images[NUM_IMAGES // 2 :] += 130
    targets = np.repeat([0, 1], NUM_IMAGES // 2).astype(np.int64)
    return PreparedDataset(images, np.arange(NUM_IMAGES), targets, None, seed=0)


def build(channels=3, **options):
    torch.manual_seed(0)
    statistics = (0.5,) * channels
    config = ClassifierConfig("test_efficientnet", ["dark", "bright"], (32, 32), (32, 32), statistics, statistics)
    return build_classifier(config, "none", **options)


def recipe_of(name="fine_tuned", epochs=2, patience=5, **knobs):
    plain = {
        "steps": RECIPES[name],
        "schedule": Schedule(epochs, patience, "32-true"),
        "size": (32, 32),
        "batch_size": 16,
        "optimizer": "adamw",
        "learning_rate": 0.005,
        "epsilon": None,
        "layer_decay": 1.0,
        "frozen": 0.0,
        "rate_schedule": "one_cycle",
        "weight_decay": 0.01,
        "l1": 0.0,
        "label_smoothing": 0.1,
        "mixup": 0.0,
        "cutmix": 0.0,
        "ema_decay": 0.0,
        "balances_classes": False,
        "adapts_batch_norm": True,
        "refits": False,
        "compiles": False,
    }
    return Recipe(**(plain | knobs))


def train(dataset, folder, recipe, report=lambda epoch, metrics: None, **options):
    folder.mkdir(exist_ok=True)
    classifier = build(**options)
    return classifier, train_network(classifier, dataset, dataset, recipe, folder, report)


def predict(classifier, dataset):
    images = torch.from_numpy(dataset.images[dataset.rows]).permute(0, 3, 1, 2)
    return predict_probabilities(classifier.eval(), images)


def compute_accuracy(classifier, dataset):
    return (predict(classifier, dataset).argmax(dim=1) == dataset.targets).float().mean()


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_learns_what_can_be_learnt(bright_and_dark, tmp_path, name):
    classifier, _ = train(bright_and_dark, tmp_path, recipe_of(name, epochs=10))
    assert compute_accuracy(classifier, bright_and_dark) > 0.9


@pytest.mark.parametrize(("name", "epochs"), [("features", [0]), ("scratch", [0, 1]), ("fine_tuned", [0, 1, 2])])
def test_a_head_on_frozen_features_is_epoch_0_and_the_whole_network_counts_on(bright_and_dark, tmp_path, name, epochs):
    told = []
    _, history = train(bright_and_dark, tmp_path, recipe_of(name), lambda epoch, metrics: told.append((epoch, metrics)))
    assert [epoch for epoch, _ in told] == epochs
    assert list(history.to_table()["epoch"]) == epochs
    assert all({"train/loss", "val/loss", "val/calibrated_loss", "val/accuracy"} <= set(metrics) for _, metrics in told)


def test_the_best_epoch_has_the_lowest_calibrated_loss_on_val_and_its_weights_are_kept(bright_and_dark, tmp_path):
    classifier, history = train(bright_and_dark, tmp_path, recipe_of())
    assert history.best_epoch == history.to_table()["val/calibrated_loss"].argmin()
    kept = {key: value.clone() for key, value in classifier.state_dict().items()}
    load_weights(classifier, tmp_path / "model.safetensors")
    assert all(torch.equal(kept[key], value) for key, value in classifier.state_dict().items())
    assert (tmp_path / "last.safetensors").exists()


def test_a_training_that_diverges_ends_with_the_head_it_began_with(bright_and_dark, tmp_path):
    _, history = train(bright_and_dark, tmp_path, recipe_of(optimizer="sgd", learning_rate=1e30))
    assert history.best_epoch == 0
    assert np.isnan(history.rows[-1]["val/calibrated_loss"])


@pytest.mark.parametrize("refits", [False, True])
def test_a_training_that_diverges_from_its_first_epoch_is_refused(bright_and_dark, tmp_path, refits):
    with pytest.raises(ConfigError, match="diverged"):
        train(bright_and_dark, tmp_path, recipe_of("scratch", optimizer="sgd", learning_rate=1e30, refits=refits))


def test_a_second_training_that_diverges_is_refused(bright_and_dark, tmp_path):
    fitted, val = divide(bright_and_dark)
    classifier, recipe = build(), recipe_of("scratch", refits=True)
    history = History(classifier, tmp_path, lambda epoch, metrics: None, JUDGED_BY)
    save_weights(classifier.state_dict(), tmp_path / "start.safetensors")
    with pytest.raises(ConfigError, match="diverged"):
        refit(classifier, fitted.join(val), replace(recipe, optimizer="sgd", learning_rate=1e30), history)


@pytest.mark.parametrize("num_steps", range(1, 9))
@pytest.mark.parametrize("name", ["adamw", "sgd", "adagrad"])
def test_one_cycle_may_be_of_any_number_of_steps(name, num_steps):
    weights = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(weights, name, 0.1, 0.0, 1.0, None)
    schedule = build_one_cycle(optimizer, Mock(spec=Trainer, estimated_stepping_batches=num_steps))
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule["lr_scheduler"]["scheduler"].step()
    assert max(rates) <= 0.1 + 1e-9
    assert max(rates) > 0.04 or num_steps < 3


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_a_moving_average_moves_once_a_step_of_the_optimizer(bright_and_dark, tmp_path, monkeypatch, accumulate):
    moved = []
    monkeypatch.setattr(AveragedModel, "update_parameters", lambda self, model: moved.append(1))
    schedule = Schedule(2, 5, "32-true", accumulate=accumulate)
    train(bright_and_dark, tmp_path, recipe_of("scratch", schedule=schedule, ema_decay=0.5, batch_size=10))
    num_batches = NUM_IMAGES // 10
    assert len(moved) == 2 * -(-num_batches // accumulate)


def test_a_head_may_be_a_convolution(bright_and_dark, tmp_path):
    config = ClassifierConfig("resnetv2_18", ["dark", "bright"], (32, 32), (32, 32), (0.5,) * 3, (0.5,) * 3)
    classifier = build_classifier(config, "none")
    assert isinstance(classifier.head, torch.nn.Conv2d)
    train_network(classifier, bright_and_dark, bright_and_dark, recipe_of("features"), tmp_path, lambda *_: None)
    assert compute_accuracy(classifier, bright_and_dark) > 0.9
    images = torch.from_numpy(bright_and_dark.images[:4]).permute(0, 3, 1, 2)
    features, logits = classifier.compute_both(images)
    torch.testing.assert_close(features @ classifier.head.weight.flatten(1).T + classifier.head.bias, logits)


def test_an_auxiliary_head_says_nothing_until_it_has_learnt_and_is_part_of_what_is_said(bright_and_dark):
    config = ClassifierConfig("volo_d1_224", ["dark", "bright"], (32, 32), (224, 224), (0.5,) * 3, (0.5,) * 3)
    classifier = build_classifier(config, "none").eval()
    images = torch.from_numpy(bright_and_dark.images[:2]).permute(0, 3, 1, 2)
    with torch.inference_mode():
        features, logits = classifier.compute_both(images)
        torch.testing.assert_close(classifier.head(features), logits)
        torch.nn.init.normal_(classifier.backbone.aux_head.weight)
        _, logits = classifier.compute_both(images)
        torch.testing.assert_close(classifier(images), logits)
        assert not torch.allclose(classifier.head(features), logits)


def test_a_network_without_a_linear_head_is_trained_whole_alone(bright_and_dark, tmp_path):
    name = "deit_tiny_distilled_patch16_224"  # two heads
    config = ClassifierConfig(name, ["dark", "bright"], (32, 32), (32, 32), (0.5,) * 3, (0.5,) * 3)
    classifier = build_classifier(config, "none")
    with pytest.raises(ConfigError, match=f"{name} ends in no linear layer.*scratch"):
        train_network(classifier, bright_and_dark, bright_and_dark, recipe_of("features"), tmp_path, lambda *_: None)


def test_a_head_alone_leaves_the_backbone_as_it_was(bright_and_dark, tmp_path):
    untouched = build()
    classifier, _ = train(bright_and_dark, tmp_path, recipe_of("features"))
    heads = {name for name, _ in classifier.named_parameters() if "classifier" in name}
    before, after = untouched.state_dict(), classifier.state_dict()
    assert {key for key in after if not torch.equal(before[key], after[key])} == heads


def divide(dataset):
    """A third of it to judge by."""
    is_val = np.arange(NUM_IMAGES) % 3 == 0
    parts = (np.flatnonzero(rows) for rows in (~is_val, is_val))
    return [PreparedDataset(dataset.images, rows, dataset.targets.numpy()[rows], None, seed=0) for rows in parts]


def test_a_head_is_judged_without_val_and_kept_with_it(bright_and_dark, tmp_path):
    fitted, val = divide(bright_and_dark)
    classifier = build()
    history = train_network(classifier, fitted, val, recipe_of("features"), tmp_path, lambda epoch, metrics: None)
    (features, targets), (val_features, val_targets) = (compute_features(classifier, one) for one in (fitted, val))
    penalty = history.rows[0]["head_penalty"]

    judged = LogisticRegression(C=penalty / len(fitted)).fit(features, targets).predict_proba(val_features)
    assert history.rows[0]["val/loss"] == pytest.approx(log_loss(val_targets, judged), rel=1e-3)
    features, targets = np.concatenate([features, val_features]), np.concatenate([targets, val_targets])
    kept = LogisticRegression(C=penalty / NUM_IMAGES).fit(features, targets).predict_proba(val_features)
    np.testing.assert_allclose(predict(classifier, val), kept, atol=1e-4)
    assert np.abs(kept - judged).max() > 1e-3


def test_the_whole_network_goes_on_from_the_head_that_val_has_judged(bright_and_dark, tmp_path):
    fitted, val = divide(bright_and_dark)
    classifier = build()
    history = History(classifier, tmp_path, lambda epoch, metrics: None, JUDGED_BY)
    train_head(classifier, fitted, val, recipe_of(refits=True), history)
    begun = F.nll_loss(predict(classifier, val).log(), val.targets).item()
    assert begun == pytest.approx(history.rows[0]["val/loss"], rel=1e-3)
    for name in ("model.safetensors", "start.safetensors"):  # what is kept, and what a second training goes on from
        load_weights(classifier, tmp_path / name)
        assert F.nll_loss(predict(classifier, val).log(), val.targets).item() < begun - 1e-3


def test_pretrained_statistics_stay_where_batch_norm_must_not_adapt(bright_and_dark, tmp_path):
    before = {key: value.clone() for key, value in build().named_buffers() if "running" in key}
    classifier, _ = train(bright_and_dark, tmp_path, recipe_of(epochs=1, adapts_batch_norm=False))
    load_weights(classifier, tmp_path / "last.safetensors")
    after = dict(classifier.named_buffers())
    assert all(torch.equal(value, after[key]) for key, value in before.items())


KNOBS = [
    {},
    {"rate_schedule": "cosine", "mixup": 0.2, "cutmix": 1.0},
    {"rate_schedule": "plateau", "ema_decay": 0.9, "optimizer": "sgd"},
    {"layer_decay": 0.8, "balances_classes": True, "l1": 1e-5, "frozen": 0.4},
]


@pytest.mark.parametrize("knobs", KNOBS, ids=lambda knobs: " ".join(knobs) or "plain")
def test_the_same_seed_gives_the_same_losses(bright_and_dark, tmp_path, knobs):
    tables = [train(bright_and_dark, tmp_path / name, recipe_of(**knobs))[1].to_table() for name in "ab"]
    pd.testing.assert_frame_equal(*tables)


@pytest.mark.parametrize("knobs", KNOBS, ids=lambda knobs: " ".join(knobs) or "plain")
def test_a_stopped_training_goes_on_and_ends_as_if_it_had_never_stopped(bright_and_dark, tmp_path, knobs):
    recipe = recipe_of(epochs=4, **knobs)

    def stop(epoch, metrics):
        if epoch == 3:
            raise KeyboardInterrupt

    whole, expected = train(bright_and_dark, tmp_path / "whole", recipe, drop_rate=0.3)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(bright_and_dark, tmp_path / "stopped", recipe, stop, drop_rate=0.3)
    told = []
    resumed, history = train(
        bright_and_dark, tmp_path / "stopped", recipe, lambda epoch, _: told.append(epoch), drop_rate=0.3
    )
    assert told == [0, 1, 2, 3, 4]
    pd.testing.assert_frame_equal(history.to_table(), expected.to_table())
    for name in ("model.safetensors", "last.safetensors"):
        load_weights(whole, tmp_path / "whole" / name)
        load_weights(resumed, tmp_path / "stopped" / name)
        assert all(torch.equal(one, whole.state_dict()[key]) for key, one in resumed.state_dict().items())


@pytest.mark.parametrize(("patience", "num_rows"), [(1, 3), (9, 5)])
def test_a_training_that_had_ended_has_nothing_to_go_on_with(bright_and_dark, tmp_path, patience, num_rows):
    recipe = recipe_of(epochs=4, patience=patience)
    _, expected = train(bright_and_dark, tmp_path, recipe)
    assert len(expected.rows) == num_rows
    _, history = train(bright_and_dark, tmp_path, recipe)
    pd.testing.assert_frame_equal(history.to_table(), expected.to_table())


def test_the_order_of_images_goes_on_after_a_stop_with_workers_too(bright_and_dark, tmp_path, monkeypatch):
    monkeypatch.setattr("loupe.training.classifier.choose_num_workers", lambda: 2)
    recipe = recipe_of("scratch", epochs=3)
    _, expected = train(bright_and_dark, tmp_path / "whole", recipe)

    def stop(epoch, metrics):
        if epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(bright_and_dark, tmp_path / "stopped", recipe, stop)
    _, history = train(bright_and_dark, tmp_path / "stopped", recipe)
    pd.testing.assert_frame_equal(history.to_table(), expected.to_table())


REFIT = {"epochs": 4, "patience": 2, "learning_rate": 0.02, "label_smoothing": 0.0, "refits": True}


def train_divided(dataset, folder, recipe, report=lambda epoch, metrics: None):
    """Half of the images are trained on, and the others are val."""
    folder.mkdir(exist_ok=True)
    classifier = build(drop_rate=0.3)
    return classifier, train_network(classifier, *divide(dataset), recipe, folder, report)


def test_once_val_has_judged_all_epochs_are_trained_again_on_its_images_too(bright_and_dark, tmp_path):
    told = []
    refitted, history = train_divided(
        bright_and_dark, tmp_path / "twice", recipe_of(**REFIT), lambda *one: told.append(one)
    )
    once, expected = train_divided(bright_and_dark, tmp_path / "once", recipe_of(**REFIT | {"refits": False}))
    assert is_refitted(recipe_of(**REFIT), history)
    assert has_learnt_from_val(recipe_of(**REFIT), history)
    assert not has_learnt_from_val(recipe_of(**REFIT | {"refits": False}), expected)
    pd.testing.assert_frame_equal(history.to_table(), expected.to_table())
    assert [epoch for epoch, metrics in told if "refit/train/loss" in metrics] == [0, 1, 2, 3]
    assert not any("val" in name for _, metrics in told for name in metrics if name.startswith("refit"))

    alone = build(drop_rate=0.3)
    load_weights(alone, tmp_path / "twice" / "start.safetensors")
    assert not refitted.training  # what embeds and predicts now does so as what is saved
    assert not once.training
    train, val = divide(bright_and_dark)
    again = History(alone, tmp_path, lambda epoch, metrics: None, "train/loss")
    train_whole(alone, train.join(val), None, recipe_of(**REFIT), again)
    assert all(torch.equal(value, alone.state_dict()[key]) for key, value in refitted.state_dict().items())
    assert not torch.equal(refitted.head.weight, once.head.weight)


def test_a_head_that_val_prefers_is_not_trained_on(bright_and_dark, tmp_path):
    recipe = recipe_of(**REFIT | {"optimizer": "sgd", "learning_rate": 1e30})
    told = []
    classifier, history = train_divided(bright_and_dark, tmp_path, recipe, lambda epoch, _: told.append(epoch))
    assert history.best_epoch == 0
    assert not is_refitted(recipe, history)
    assert has_learnt_from_val(recipe, history)
    assert told == list(range(len(history.rows)))
    kept = {key: value.clone() for key, value in classifier.state_dict().items()}
    load_weights(classifier, tmp_path / "model.safetensors")
    assert all(torch.equal(kept[key], value) for key, value in classifier.state_dict().items())


@pytest.mark.parametrize("stopped_at", [0, 2, 3])
def test_what_is_stopped_while_it_is_trained_again_goes_on_there(bright_and_dark, tmp_path, stopped_at):
    recipe = recipe_of(**REFIT)
    whole, expected = train_divided(bright_and_dark, tmp_path / "whole", recipe)

    def stop(epoch, metrics):
        if epoch == stopped_at and "refit/train/loss" in metrics:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train_divided(bright_and_dark, tmp_path / "stopped", recipe, stop)
    told = []
    resumed, history = train_divided(bright_and_dark, tmp_path / "stopped", recipe, lambda *one: told.append(one))
    pd.testing.assert_frame_equal(history.to_table(), expected.to_table())
    assert [epoch for epoch, metrics in told if "refit/train/loss" in metrics] == [0, 1, 2, 3]
    assert all(torch.equal(one, whole.state_dict()[key]) for key, one in resumed.state_dict().items())


def test_a_moving_average_is_what_is_validated_and_kept(bright_and_dark, tmp_path):
    classifier, history = train(bright_and_dark, tmp_path / "averaged", recipe_of("scratch", ema_decay=0.5))
    images = torch.from_numpy(bright_and_dark.images).permute(0, 3, 1, 2)
    loss = F.nll_loss(predict_probabilities(classifier.eval(), images).log(), bright_and_dark.targets)
    assert float(loss) == pytest.approx(history.rows[history.best_epoch]["val/loss"], rel=1e-3)
    other, _ = train(bright_and_dark, tmp_path / "none", recipe_of("scratch"))
    assert not torch.equal(classifier.head.weight, other.head.weight)


def test_a_network_may_be_used_on_larger_images_than_it_learns_from(bright_and_dark, tmp_path, monkeypatch):
    seen = []
    forward = Preprocess.forward
    monkeypatch.setattr(Preprocess, "forward", lambda self, images: seen.append(self.size) or forward(self, images))
    classifier, _ = train(bright_and_dark, tmp_path, recipe_of("scratch", epochs=1, size=(24, 24)))
    assert set(seen) == {(24, 24), (32, 32)}
    assert seen.index((24, 24)) < seen.index((32, 32))
    assert classifier.preprocess.size == (32, 32)


def test_l1_makes_weights_smaller(bright_and_dark, tmp_path):
    sums = []
    for l1 in (0.0, 0.01):
        classifier, _ = train(bright_and_dark, tmp_path / str(l1), recipe_of("scratch", epochs=3, l1=l1))
        load_weights(classifier, tmp_path / str(l1) / "last.safetensors")
        sums.append(sum(float(one.detach().abs().sum()) for one in classifier.parameters() if one.ndim > 1))
    assert sums[1] < 0.9 * sums[0]


def test_rates_decay_from_the_head_down():
    backbone = build().backbone
    optimizer = build_optimizer(backbone, "adamw", 0.01, 0.0, 0.5)
    rates = {id(one): group["lr"] for group in optimizer.param_groups for one in group["params"]}
    assert rates[id(backbone.get_classifier().weight)] == 0.01
    assert rates[id(backbone.conv_stem.weight)] < 0.001


@pytest.mark.parametrize("name", ["dense_network", "small_cnn", "lenet5", "alexnet"])
def test_rates_decay_with_each_layer_of_the_courses_networks(name):
    backbone = timm.create_model(name)
    optimizer = build_optimizer(backbone, "adamw", 0.01, 0.0, 0.5)
    rates = {id(one): group["lr"] for group in optimizer.param_groups for one in group["params"]}
    layers = [layer for layer in backbone.modules() if hasattr(layer, "weight")]
    assert len(layers) >= 3
    for place, layer in enumerate(reversed(layers)):
        assert rates[id(layer.weight)] == rates[id(layer.bias)] == 0.01 * 0.5**place


@pytest.mark.parametrize(
    ("name", "expected"), [("adamw", 1e-3), ("nadam", 1e-3), ("rmsproptf", 1e-10), ("lamb", 1e-6), ("sgd", None)]
)
def test_the_epsilon_is_of_adam_and_its_kin_alone(name, expected):
    optimizer = build_optimizer(build().backbone, name, 0.01, 0.0, 1.0, epsilon=1e-3)
    assert {group.get("eps") for group in optimizer.param_groups} == {expected}


def test_an_epsilon_that_outweighs_the_gradients_leaves_the_weights_almost_as_they_are(bright_and_dark, tmp_path):
    def move(epsilon):
        classifier, _ = train(bright_and_dark, tmp_path / str(epsilon), recipe_of("scratch", 1, epsilon=epsilon))
        return float((classifier.head.weight - build().head.weight).detach().abs().max())

    assert move(1e3) < 0.01 * move(None)


def list_trained(network):
    return {name for name, weights in network.named_parameters() if weights.requires_grad}


@pytest.mark.parametrize(
    ("name", "frozen"),
    [
        ("tf_efficientnet_lite0", ("conv_stem", "bn1", "blocks.0", "blocks.1", "blocks.2")),
        ("resnet18", ("conv1", "bn1", "layer1", "layer2")),
        ("vit_tiny_patch16_224", ("patch_embed", "cls_token", "pos_embed", *(f"blocks.{one}." for one in range(6)))),
        ("lenet5", ("features.c1", "features.c3")),
    ],
)
def test_half_of_the_stages_may_be_frozen_from_the_input_on(name, frozen):
    network = timm.create_model(name)
    whole = list_trained(network)
    freeze_layers(network, 0.5)
    assert whole - list_trained(network) == {one for one in whole if one.startswith(frozen)} != set()
    freeze_layers(network, 0.0)
    assert list_trained(network) == whole


def test_a_network_without_coarse_groups_is_frozen_layer_by_layer():
    network = timm.create_model("rdnet_tiny")
    whole = list_trained(network)
    freeze_layers(network, 0.5)
    trained = list_trained(network)
    assert {"head.fc.weight", "head.fc.bias"} < trained < {name for name in whole if not name.startswith("stem")}
    freeze_layers(network, 0.0)
    assert list_trained(network) == whole


def test_frozen_layers_keep_their_weights_and_statistics_and_can_be_trained_later(bright_and_dark, tmp_path):
    before = {key: value.clone() for key, value in build().state_dict().items()}
    classifier, _ = train(bright_and_dark, tmp_path, recipe_of("scratch", epochs=1, frozen=0.5))
    load_weights(classifier, tmp_path / "last.safetensors")
    kept = {key for key, value in classifier.state_dict().items() if torch.equal(value, before[key])}
    assert {"backbone.conv_stem.weight", "backbone.bn1.running_mean", "backbone.bn1.weight"} <= kept
    assert not {"backbone.conv_head.weight", "backbone.bn2.running_mean", "backbone.classifier.weight"} & kept
    assert list_trained(classifier) == {name for name, _ in classifier.named_parameters()}


def test_an_unknown_optimizer_is_answered_with_the_nearest_names():
    with pytest.raises(ConfigError, match=r"timm has no optimizer 'adanw2'; nearest names: adanw"):
        check_optimizer("adanw2")


def test_an_optimizer_that_can_make_no_step_here_is_one_sentence():
    with pytest.raises(ConfigError, match="optimizer: adahessian can't be used here: ") as error:
        check_optimizer("adahessian")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPU: can't allocate memory")])
def test_a_batch_that_does_not_fit_is_answered_with_what_to_lower(bright_and_dark, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(ClassifierTraining, "training_step", fail)
    with pytest.raises(ConfigError, match="batches of 16 images don't fit the memory: lower the batch_size"):
        train(bright_and_dark, tmp_path, recipe_of("scratch"))


def test_checkpoints_bring_back_what_was_put_in(tmp_path):
    tree = {"epoch": 3, "state": {0: {"step": torch.tensor(2.0), "rates": [0.1, None, True], "betas": (0.9, ("x",))}}}
    tree |= {"empty": {}, "dtype": torch.bfloat16}
    SafetensorsIO().save_checkpoint(tree, tmp_path / "checkpoint.safetensors")
    loaded = SafetensorsIO().load_checkpoint(tmp_path / "checkpoint.safetensors")
    assert loaded == tree
    assert list(loaded["state"]) == [0]
    assert read_epoch(tmp_path / "checkpoint.safetensors") == 4
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_an_autoencoder_scores_what_it_never_saw_higher(bright_and_dark, tmp_path):
    torch.manual_seed(0)
    half = NUM_IMAGES // 2
    dark = PreparedDataset(bright_and_dark.images, np.arange(half), np.zeros(half, np.int64), None, seed=0)
    autoencoder = Autoencoder(AutoencoderConfig(3, 4, 2, (32, 32), (32, 32)))
    train_detector(
        autoencoder, dark, dark, Reconstruction(Schedule(8, 8, "32-true"), 8, 0.01), tmp_path, lambda *_: None
    )
    scores, _ = detect(autoencoder.eval(), torch.from_numpy(bright_and_dark.images).permute(0, 3, 1, 2))
    assert scores[half:].min() > scores[:half].max()


def test_lightning_tells_the_sampler_each_epoch_so_that_none_augments_like_another(bright_and_dark, tmp_path):
    epochs = []

    class Watched(PreparedDataset):
        def __getitems__(self, keys):
            epochs.append({epoch for epoch, _ in keys})
            return super().__getitems__(keys)

    one_at_a_time = build_augmentation([{"name": "RandomBrightnessContrast"}])
    targets = np.zeros(NUM_IMAGES, np.int64)
    watched = Watched(bright_and_dark.images, bright_and_dark.rows, targets, one_at_a_time, seed=0)
    autoencoder = Autoencoder(AutoencoderConfig(3, 4, 2, (32, 32), (32, 32)))
    train_detector(
        autoencoder,
        watched,
        bright_and_dark,
        Reconstruction(Schedule(3, 8, "32-true"), 24, 0.01),
        tmp_path,
        lambda *_: None,
    )
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
