import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from loupe.errors import ConfigError
from loupe.models.detectors.base import detect
from loupe.models.detectors.vae import (
    LEAST_VARIANCE,
    Vae,
    VaeConfig,
    compute_kl,
    compute_surprise,
    compute_weight,
)

CODE = (3, 2, 2, 4)


def build(**knobs):
    torch.manual_seed(0)
    return Vae(VaeConfig(1, 4, 2, (32, 32), (32, 32), **knobs)).eval()


def draw_pixels(num_images=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num_images, 1, 32, 32), dtype=torch.uint8, generator=generator)


def draw_codes():
    generator = torch.Generator().manual_seed(0)
    mean, log_variance = torch.randn(2, *CODE, generator=generator)
    return mean, 0.7 * log_variance


def test_the_divergence_agrees_with_sampling_within_four_standard_errors():
    mean, log_variance = draw_codes()
    code, prior = (
        Independent(Normal(at, spread, validate_args=False), 3)
        for at, spread in ((mean, (log_variance / 2).exp()), (torch.zeros(CODE), torch.ones(CODE)))
    )
    torch.manual_seed(0)
    drawn = code.sample((40_000,))
    ratios = code.log_prob(drawn) - prior.log_prob(drawn)
    standard_errors = ratios.std(dim=0) / len(ratios) ** 0.5
    assert (standard_errors < 0.01 * ratios.mean(dim=0)).all()
    assert ((compute_kl(mean, log_variance) - ratios.mean(dim=0)).abs() < 4 * standard_errors).all()


def test_the_divergence_is_torchs_own_and_0_at_the_prior():
    mean, log_variance = draw_codes()
    code = Independent(Normal(mean, (log_variance / 2).exp()), 3)
    prior = Independent(Normal(torch.zeros(CODE), torch.ones(CODE)), 3)
    torch.testing.assert_close(compute_kl(mean, log_variance), kl_divergence(code, prior))
    assert (compute_kl(torch.zeros(CODE), torch.zeros(CODE)) == 0).all()


def test_the_reconstruction_is_the_negative_log_density_of_an_image_in_nats():
    targets, reconstructions = torch.rand(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    variance = torch.tensor(0.03)
    density = Independent(Normal(reconstructions, variance.sqrt()), 3)
    torch.testing.assert_close(compute_surprise(targets, reconstructions, variance), -density.log_prob(targets))


def test_the_loss_is_the_sum_of_its_parts_with_the_weight_of_the_moment():
    detector, images = build(beta=4.0, warm_up=0.5), draw_pixels()
    for progress, weight in ((0.0, 0.0), (0.25, 2.0), (0.5, 4.0), (1.0, 4.0)):
        losses = detector.compute_losses(images, progress)
        assert set(losses) == {"loss", "reconstruction", "kl"}
        torch.testing.assert_close(losses["loss"], losses["reconstruction"] + weight * losses["kl"])
        assert losses["kl"] > 0


def test_the_weight_grows_to_beta_and_is_beta_at_once_without_a_warm_up():
    assert [compute_weight(2.0, 0.4, progress) for progress in (0.0, 0.1, 0.2, 0.4, 0.9)] == [0.0, 0.5, 1.0, 2.0, 2.0]
    assert compute_weight(2.0, 0.0, 0.0) == 2.0


def test_the_code_is_drawn_for_the_loss_and_its_mean_is_scored():
    detector, images = build(), draw_pixels()
    first, second = (detector.compute_losses(images, 1.0)["reconstruction"] for _ in range(2))
    assert first != second
    mean, log_variance = detector.encode_distribution(detector.preprocess(images))
    torch.testing.assert_close(detector.embed(images), mean.flatten(1))
    torch.testing.assert_close(detector.reconstruct(images)[1], detector.decoder(mean))
    assert log_variance.shape == mean.shape
    for one, other in zip(detect(detector, images), detect(detector, images), strict=True):
        assert torch.equal(one, other)


def test_gradients_pass_through_what_is_drawn():
    detector = build(beta=0.0)
    detector.compute_losses(draw_pixels(), 1.0)["loss"].backward()
    last = detector.encoder[-1].weight.grad.flatten(1).abs().sum(dim=1)
    assert (last > 0).all()  # means and variances


def test_the_score_is_either_part_or_both_and_the_map_is_the_squared_error():
    images = draw_pixels()
    scores, maps = {}, {}
    for score in ("reconstruction", "kl", "elbo"):
        scores[score], maps[score] = detect(build(score=score), images)
    torch.testing.assert_close(scores["elbo"], scores["reconstruction"] + scores["kl"])
    detector = build()
    targets, reconstructions = detector.reconstruct(images)
    expected = compute_surprise(targets, reconstructions, detector.variance).detach()
    torch.testing.assert_close(scores["reconstruction"], expected)
    squares = (targets - reconstructions).square().mean(dim=1).detach()
    for one in maps.values():
        torch.testing.assert_close(one, squares)


def test_the_variance_follows_the_error_in_training_alone():
    detector, images = build(), draw_pixels()
    before = detector.variance.clone()
    detector.compute_losses(images, 1.0)
    assert torch.equal(detector.variance, before)
    detector.train()
    torch.manual_seed(1)
    losses = detector.compute_losses(images, 1.0)
    num_values = images[0].numel()
    squared = (detector.variance - 0.9 * before) / 0.1
    expected = num_values / 2 * ((2 * torch.pi * squared).log() + 1)  # of the likeliest variance
    torch.testing.assert_close(losses["reconstruction"], expected, rtol=1e-4, atol=0)


def test_a_perfect_reconstruction_is_no_surer_than_rounding_allows():
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    detector = build().train()
    assert float(detector._choose_variance(images, images)) == pytest.approx(LEAST_VARIANCE)


def test_another_loss_is_refused():
    with pytest.raises(ConfigError, match="its loss must be mse; got ssim"):
        build(loss="ssim")


def test_it_learns_and_a_stripe_becomes_the_most_anomalous_by_each_score():
    flat = torch.full((16, 1, 32, 32), 60, dtype=torch.uint8) + torch.arange(16, dtype=torch.uint8).view(-1, 1, 1, 1)
    striped = flat[8:9].clone()
    striped[:, :, 10:14] = 255
    detector = build().train()
    optimizer = torch.optim.Adam(detector.parameters(), 0.01)
    losses = []
    for step in range(80):
        loss = detector.compute_losses(flat, step / 80)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 1000
    weights = detector.state_dict()
    for score in ("reconstruction", "kl", "elbo"):
        scorer = build(score=score)
        scorer.load_state_dict(weights)
        scores, maps = detect(scorer, torch.cat([flat, striped]))
        assert scores.argmax() == 16
    assert 9 <= maps[16].mean(dim=1).argmax() <= 14
