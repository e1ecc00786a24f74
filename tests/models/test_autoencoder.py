import onnxruntime
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from loupe.errors import ConfigError
from loupe.models.detectors.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    compute_dissimilarities,
    compute_errors,
)
from loupe.models.detectors.base import detect, save_detector
from loupe.models.detectors.denoising_autoencoder import DenoisingAutoencoder, DenoisingConfig
from loupe.models.detectors.family import FAMILY, build_detector, load_detector
from loupe.models.detectors.vae import Vae, VaeConfig
from loupe.models.files import load_config

SMALL = {"channels": 1, "width": 4, "latent_channels": 2, "crop": (28, 28), "size": (32, 32)}
MEMBERS = [
    pytest.param(Autoencoder, AutoencoderConfig, {}, id="autoencoder"),
    pytest.param(Autoencoder, AutoencoderConfig, {"loss": "ssim"}, id="autoencoder_ssim"),
    pytest.param(DenoisingAutoencoder, DenoisingConfig, {}, id="denoising_autoencoder"),
    pytest.param(Vae, VaeConfig, {}, id="vae"),
    pytest.param(Vae, VaeConfig, {"score": "kl"}, id="vae_kl"),
]


def build(kind=Autoencoder, config_type=AutoencoderConfig, **options):
    torch.manual_seed(0)
    return kind(config_type(**(SMALL | options))).eval()


def draw_pixels(num_images=5, channels=1, sides=(28, 28)):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num_images, channels, *sides), dtype=torch.uint8, generator=generator)


def draw_pairs(channels=3, sides=(24, 40)):
    """Smooth images, and others that are a little like them."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(2, 2, channels, *sides, generator=generator).numpy()
    smooth = torch.from_numpy(gaussian_filter(noise, (0, 0, 0, 2, 2)))
    smooth = (smooth - smooth.min()) / (smooth.max() - smooth.min())
    return smooth[0], 0.7 * smooth[0] + 0.3 * smooth[1]


def train(detector, images, num_steps, rate=0.01):
    optimizer = torch.optim.Adam(detector.train().parameters(), rate)
    for step in range(num_steps):
        losses = detector.compute_losses(images, step / num_steps)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    detector.eval()


def draw_flat_and_striped():
    """Flat images, more or less bright, and the middle one of them with a bright stripe in rows 10 to 13."""
    flat = torch.full((16, 1, 28, 28), 60, dtype=torch.uint8) + torch.arange(16, dtype=torch.uint8)[:, None, None, None]
    striped = flat[8:9].clone()
    striped[:, :, 10:14] = 255
    return flat, striped


@pytest.mark.parametrize(("kind", "config_type", "knobs"), MEMBERS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (40, 24), (8, 16)])
def test_any_size_in_multiples_of_8_will_do(kind, config_type, knobs, channels, size):
    detector = build(kind, config_type, **knobs, channels=channels, size=size, crop=(26, 28))
    images = draw_pixels(channels=channels, sides=(30, 28))
    targets, reconstructions = detector.reconstruct(images)
    assert targets.shape == reconstructions.shape == (5, channels, *size)
    assert 0 <= reconstructions.min() <= reconstructions.max() <= 1
    assert 0 <= targets.min() <= targets.max() <= 1
    scores, maps = detect(detector, images)
    assert (scores.shape, maps.shape) == ((5,), (5, 30, 28))
    assert maps.min() >= 0
    assert detector.embed(images).shape == (5, 2 * size[0] // 8 * size[1] // 8)
    assert torch.isfinite(detector.train().compute_losses(images, 0.5)["loss"])


def test_the_code_is_smaller_than_the_image():
    assert build(size=(64, 64)).encode(torch.zeros(1, 1, 64, 64)).shape == (1, 2, 8, 8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": (36, 32)}, "in multiples of 8 pixels, got 36 x 32"),
        (
            {"size": (176, 168), "loss": "ms_ssim"},
            "at least 176 x 176 pixels, got 176 x 168: choose a larger input size",
        ),
    ],
)
def test_an_input_size_that_does_not_fit_is_one_sentence(options, said):
    with pytest.raises(ConfigError, match=said):
        build(**options)


def test_errors_are_mean_squares_over_the_channels_of_each_pixel():
    targets, rebuilt = torch.rand(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    errors = compute_errors(targets, rebuilt)
    for image in range(2):
        for row in range(4):
            for column in range(5):
                squares = [(targets[image, c, row, column] - rebuilt[image, c, row, column]) ** 2 for c in range(3)]
                torch.testing.assert_close(errors[image, row, column], sum(squares) / 3)


def test_a_perfect_reconstruction_has_no_error_and_the_worst_one():
    black, white = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    assert compute_errors(white, white).mean() == 0
    assert compute_errors(white, black).mean() == 1


def test_dissimilarities_are_those_of_the_papers_formula_by_another_library():
    targets, rebuilt = draw_pairs()

    def blur(values):
        return gaussian_filter(values.double().numpy(), (0, 0, 1.5, 1.5), mode="mirror", truncate=3.5)

    mean, other = blur(targets), blur(rebuilt)
    variances = blur(targets**2) - mean**2 + blur(rebuilt**2) - other**2
    covariance = blur(targets * rebuilt) - mean * other
    similarity = (2 * mean * other + 0.01**2) / (mean**2 + other**2 + 0.01**2)
    similarity *= (2 * covariance + 0.03**2) / (variances + 0.03**2)
    expected = torch.from_numpy(1 - similarity.mean(axis=1)).float()
    torch.testing.assert_close(compute_dissimilarities(targets, rebuilt), expected, atol=2e-4, rtol=0)
    assert expected.max() > 0.1


def test_dissimilarities_of_a_batch_are_those_that_torchmetrics_gives_of_it():
    targets, rebuilt = draw_pairs()
    _, similarities = structural_similarity_index_measure(rebuilt, targets, data_range=1.0, return_full_image=True)
    torch.testing.assert_close(compute_dissimilarities(targets, rebuilt), 1 - similarities.mean(dim=1))
    assert compute_dissimilarities(targets, targets).abs().max() < 1e-5


def test_the_losses_are_what_training_is_to_lower():
    targets, rebuilt = draw_pairs(1, (184, 176))
    one_scale = structural_similarity_index_measure(rebuilt, targets, data_range=1.0)
    five_scales = multiscale_structural_similarity_index_measure(rebuilt, targets, data_range=1.0, normalize="simple")
    expected = {"mse": (targets - rebuilt).square().mean(), "ssim": 1 - one_scale, "ms_ssim": 1 - five_scales}
    for loss, value in expected.items():
        autoencoder = build(loss=loss, size=(184, 176))
        torch.testing.assert_close(autoencoder.compare(targets, rebuilt), value)
        assert autoencoder.compare(targets, targets).abs() < 1e-5


def test_losses_are_in_full_precision_where_training_is_not():
    targets, rebuilt = draw_pairs(1)
    autoencoder = build(loss="ssim")
    with torch.autocast("cpu", torch.bfloat16):
        mixed = autoencoder.compare(targets, rebuilt)
    torch.testing.assert_close(mixed, autoencoder.compare(targets, rebuilt), rtol=0, atol=0)


@pytest.mark.parametrize("loss", ["mse", "ssim"])
def test_scores_are_the_means_of_the_maps_whatever_the_batches(loss):
    autoencoder, images = build(loss=loss), draw_pixels()
    expected = autoencoder.compute_map(*autoencoder.reconstruct(images)).detach().mean(dim=(1, 2))
    for batch_size in (1, 2, 5, 128):
        torch.testing.assert_close(detect(autoencoder, images, batch_size)[0], expected)


def test_maps_of_the_networks_own_size_are_not_resampled():
    autoencoder, images = build(crop=(32, 32)), draw_pixels(sides=(32, 32))
    expected = compute_errors(*autoencoder.reconstruct(images)).detach()
    torch.testing.assert_close(detect(autoencoder, images)[1], expected)


@pytest.mark.parametrize("loss", ["mse", "ssim"])
def test_training_on_flat_images_makes_a_stripe_the_most_anomalous(loss):
    autoencoder = build(loss=loss)
    images, striped = draw_flat_and_striped()
    train(autoencoder, images, 60)
    scores, maps = detect(autoencoder, torch.cat([images, striped]))
    assert scores.argmax() == 16
    assert 9 <= maps[16].mean(dim=1).argmax() <= 14


def test_five_scales_can_be_trained_on():
    autoencoder = build(loss="ms_ssim", crop=(176, 176), size=(176, 176), width=2)
    images = draw_pixels(2, sides=(176, 176))
    before = autoencoder.train().compute_losses(images, 0.0)["loss"]
    train(autoencoder, images, 8)
    assert autoencoder.train().compute_losses(images, 1.0)["loss"] < before


def test_all_of_the_family_are_known_by_name():
    for kind, config in ((DenoisingAutoencoder, DenoisingConfig(**SMALL)), (Vae, VaeConfig(**SMALL))):
        assert FAMILY[kind.name].config_type is type(config)
        assert isinstance(build_detector(kind.name, config, "none"), kind)


@pytest.mark.parametrize(("kind", "config_type", "knobs"), MEMBERS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_saved_detector_gives_the_same_scores_and_codes(tmp_path, kind, config_type, knobs, channels):
    saved = build(kind, config_type, channels=channels, **knobs)
    images = draw_pixels(channels=channels)
    saved.train().compute_losses(images, 0.5)  # so that there are statistics to keep
    save_detector(saved.eval(), {"threshold": 0.25}, tmp_path)
    loaded = load_detector(tmp_path)
    assert not loaded.training
    assert loaded.config == saved.config
    torch.testing.assert_close(detect(loaded, images), detect(saved, images))
    torch.testing.assert_close(loaded.embed(images), saved.embed(images))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert load_config(tmp_path)["threshold"] == 0.25


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the exporter's own code
@pytest.mark.parametrize(("kind", "config_type", "knobs"), MEMBERS)
def test_onnx_gives_the_same_scores_and_maps_in_batches_of_any_size(tmp_path, kind, config_type, knobs):
    detector, images = build(kind, config_type, **knobs), draw_pixels()
    program = torch.onnx.export(
        detector,
        (images[:2],),
        dynamo=True,
        verbose=False,
        opset_version=18,
        input_names=["images"],
        output_names=["scores", "maps"],
        dynamic_shapes={"images": {0: "batch"}},
    )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    expected = detect(detector, images)
    for num_images in (1, 2, 5):
        outputs = session.run(None, {"images": images[:num_images].numpy()})
        for output, whole in zip(outputs, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(output), whole[:num_images], rtol=1e-6, atol=1e-4)
