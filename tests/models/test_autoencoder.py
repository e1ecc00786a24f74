import pytest
import torch

from loupe.models.detectors.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    compute_anomaly_map,
    compute_anomaly_score,
    compute_maps,
    compute_scores,
    load_autoencoder,
    save_autoencoder,
)
from loupe.models.files import load_config


def config_of(channels=1, crop=(28, 28), size=(32, 32)):
    return AutoencoderConfig(channels=channels, width=4, latent_channels=2, crop=crop, size=size)


def build(seed=0, **options):
    torch.manual_seed(seed)
    return Autoencoder(config_of(**options)).eval()


def draw_pixels(num_images=5, channels=1, side=28):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num_images, channels, side, side), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (40, 24)])
def test_reconstructions_have_the_shape_of_what_the_network_sees(channels, size):
    targets, reconstructions = build(channels=channels, size=size)(draw_pixels(channels=channels))
    assert targets.shape == reconstructions.shape == (5, channels, *size)
    assert 0 <= reconstructions.min() <= reconstructions.max() <= 1
    assert 0 <= targets.min() <= targets.max() <= 1


def test_the_code_is_smaller_than_the_image():
    autoencoder = build(size=(64, 64))
    assert autoencoder.encoder(torch.zeros(1, 1, 64, 64)).shape == (1, 2, 8, 8)


def test_the_map_is_the_mean_squared_error_of_each_pixel():
    targets, rebuilt = torch.rand(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    anomaly_map = compute_anomaly_map(targets, rebuilt)
    for image in range(2):
        for row in range(4):
            for column in range(5):
                errors = [(targets[image, c, row, column] - rebuilt[image, c, row, column]) ** 2 for c in range(3)]
                torch.testing.assert_close(anomaly_map[image, row, column], sum(errors) / 3)


def test_a_perfect_reconstruction_scores_zero_and_the_worst_one():
    black, white = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    assert compute_anomaly_score(compute_anomaly_map(white, white)).item() == 0
    assert compute_anomaly_score(compute_anomaly_map(white, black)).item() == 1


def test_scores_are_the_means_of_the_maps_whatever_the_batches():
    autoencoder, images = build(), draw_pixels()
    expected = compute_anomaly_map(*autoencoder(images)).detach().mean(dim=(1, 2))
    for batch_size in (1, 2, 5, 128):
        torch.testing.assert_close(compute_scores(autoencoder, images, batch_size), expected)


@pytest.mark.parametrize("side", [28, 32, 50])
def test_maps_have_the_geometry_of_the_images(side):
    maps = compute_maps(build(crop=(side, side)), draw_pixels(side=side), batch_size=2)
    assert maps.shape == (5, side, side)
    assert maps.min() >= 0


def test_maps_of_the_networks_own_size_are_not_resampled():
    autoencoder, images = build(crop=(32, 32)), draw_pixels(side=32)
    expected = compute_anomaly_map(*autoencoder(images)).detach()
    torch.testing.assert_close(compute_maps(autoencoder, images), expected)


def test_training_on_flat_images_makes_a_stripe_the_most_anomalous():
    autoencoder = build().train()
    images = (
        torch.full((16, 1, 28, 28), 60, dtype=torch.uint8) + torch.arange(16, dtype=torch.uint8)[:, None, None, None]
    )
    optimizer = torch.optim.Adam(autoencoder.parameters(), 0.01)
    for _ in range(60):
        loss = compute_anomaly_map(*autoencoder(images)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    striped = images[8:9].clone()
    striped[:, :, 10:14] = 255
    scores = compute_scores(autoencoder.eval(), torch.cat([images, striped]))
    assert scores.argmax() == 16
    most = compute_maps(autoencoder, striped)[0].mean(dim=1).argmax()
    assert 9 <= most <= 14


@pytest.mark.parametrize("channels", [1, 3])
def test_a_saved_autoencoder_gives_the_same_scores(tmp_path, channels):
    saved, images = build(channels=channels).train(), draw_pixels(channels=channels)
    saved(images)  # so that batch normalisation has something to keep
    save_autoencoder(saved.eval(), {}, tmp_path)
    loaded = load_autoencoder(tmp_path)
    assert not loaded.training
    assert loaded.config == saved.config
    torch.testing.assert_close(compute_scores(loaded, images), compute_scores(saved, images))


def test_a_saved_autoencoder_is_safetensors_and_json_with_what_came_beside_it(tmp_path):
    save_autoencoder(build(), {"threshold": 0.25}, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert load_config(tmp_path)["threshold"] == 0.25
