import pytest
import torch
from torch.nn import functional as F

from loupe.models.detectors.base import detect
from loupe.models.detectors.denoising_autoencoder import DenoisingAutoencoder, DenoisingConfig

KNOBS = [{"noise": 0.2}, {"masked": 0.3}, {"defects": 1.0}]


def build(**knobs):
    torch.manual_seed(0)
    never = {"noise": 0.0, "masked": 0.0, "defects": 0.0}
    return DenoisingAutoencoder(DenoisingConfig(1, 8, 4, (32, 32), (32, 32), **(never | knobs))).eval()


def draw_ramps(num_images=16):
    """Brighter to the right, some more than others."""
    ramps = torch.linspace(40, 200, 32).expand(num_images, 1, 32, 32)
    return (ramps + torch.linspace(-20, 20, num_images).view(-1, 1, 1, 1)).to(torch.uint8)


def test_what_is_never_corrupted_is_trained_as_an_autoencoder_is():
    detector, images = build(), draw_ramps()
    targets, reconstructions = detector.reconstruct(images)
    torch.testing.assert_close(detector.compute_losses(images, 0.0)["loss"], F.mse_loss(reconstructions, targets))


@pytest.mark.parametrize("knobs", KNOBS, ids=lambda knobs: next(iter(knobs)))
def test_corrupted_images_go_in_and_clean_ones_must_come_out(knobs):
    detector, images = build(**knobs), draw_ramps()
    targets = detector.preprocess(images)
    torch.manual_seed(3)
    corrupted = detector.corrupt(targets)
    assert not torch.equal(corrupted, targets)
    torch.manual_seed(3)
    loss = detector.compute_losses(images, 0.0)["loss"]
    torch.testing.assert_close(loss, F.mse_loss(detector.decoder(detector.encoder(corrupted)), targets))


@pytest.mark.parametrize("knobs", KNOBS, ids=lambda knobs: next(iter(knobs)))
def test_it_learns_to_take_away_what_it_was_shown(knobs):
    detector, images = build(**knobs).train(), draw_ramps()
    optimizer = torch.optim.Adam(detector.parameters(), 0.01)
    for _ in range(120):
        loss = detector.compute_losses(images, 0.0)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    targets = detector.eval().preprocess(images)
    torch.manual_seed(1)
    corrupted = detector.corrupt(targets)
    cleaned = detector.decoder(detector.encode(corrupted))
    assert F.mse_loss(cleaned, targets) < 0.5 * F.mse_loss(corrupted, targets)


def test_nothing_is_corrupted_when_it_scores():
    detector, images = build(noise=0.5, masked=0.5, defects=1.0), draw_ramps()
    for one, other in zip(detect(detector, images), detect(detector, images), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(detector.embed(images), detector.embed(images))
