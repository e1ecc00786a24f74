"""Figures over pixels, against slow ones that go through every threshold and every pixel."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.metrics import average_precision_score, roc_auc_score

from loupe.evaluation.anomaly import compute_grouped_auroc
from loupe.evaluation.localization import LARGEST_RATE, compute_pixel_interval, compute_pixel_metrics, count_pixels


def draw(seed, shape=(4, 9, 8), decimals=1):
    """Noise that is higher where a mask is; with few decimals there are many ties."""
    generator = np.random.default_rng(seed)
    masks = (generator.random(shape) < 0.2).astype(np.uint8)
    masks[0] = 0
    return masks, np.round(generator.random(shape) + 0.4 * masks, decimals).astype(np.float32)


def list_regions(mask):
    """Flood fill, pixel by pixel; a pixel has eight neighbours."""
    left = set(zip(*(axis.tolist() for axis in np.nonzero(mask)), strict=True))
    regions = []
    while left:
        region, frontier = [], [left.pop()]
        while frontier:
            row, column = frontier.pop()
            region.append((row, column))
            near = {(row + up, column + right) for up in (-1, 0, 1) for right in (-1, 0, 1)} & left
            left -= near
            frontier += near
        regions.append(region)
    return regions


def slow_aupro(masks, maps):
    """The curve over every distinct threshold, from none flagged to all, cut off at the largest rate."""
    normal = maps[masks == 0]
    regions = [
        [one[place] for place in region] for mask, one in zip(masks, maps, strict=True) for region in list_regions(mask)
    ]
    rates, overlaps = [0.0], [0.0]
    for threshold in sorted(set(maps.reshape(-1).tolist()), reverse=True):
        rates.append(float(np.mean(normal >= threshold)))
        overlaps.append(float(np.mean([np.mean(np.array(region) >= threshold) for region in regions])))
    area = 0.0
    for start in range(len(rates) - 1):
        (left, right), (low, high) = rates[start : start + 2], overlaps[start : start + 2]
        end = min(right, LARGEST_RATE)
        if end > left:
            cut = low + (high - low) * (end - left) / (right - left)
            area += (end - left) * (low + cut) / 2
    return area / LARGEST_RATE


def slow_auroc(masks, maps):
    return np.mean([(high > maps[masks == 0]) + 0.5 * (high == maps[masks == 0]) for high in maps[masks > 0]])


@pytest.mark.parametrize("decimals", [1, 6])
@pytest.mark.parametrize("seed", range(3))
def test_figures_over_pixels_equal_their_definitions(seed, decimals):
    masks, maps = draw(seed, decimals=decimals)
    metrics = compute_pixel_metrics(masks, maps)
    assert metrics["pixel_auroc"] == pytest.approx(slow_auroc(masks, maps))
    assert metrics["aupro"] == pytest.approx(slow_aupro(masks, maps))
    targets, values = masks.reshape(-1), maps.reshape(-1)
    assert metrics["pixel_auroc"] == pytest.approx(roc_auc_score(targets, values))
    assert metrics["pixel_average_precision"] == pytest.approx(average_precision_score(targets, values))


@settings(deadline=None, max_examples=40)
@given(
    masks=arrays.arrays(np.uint8, (2, 4, 3), elements=st.integers(0, 1)),
    maps=arrays.arrays(np.float32, (2, 4, 3), elements=st.integers(-3, 3).map(float)),
)
def test_figures_equal_their_definitions_whatever_the_maps(masks, maps):
    metrics = compute_pixel_metrics(masks, maps)
    if masks.all() or not masks.any():
        assert np.isnan(list(metrics.values())).all()
    else:
        assert metrics["pixel_auroc"] == pytest.approx(slow_auroc(masks, maps))
        assert metrics["aupro"] == pytest.approx(slow_aupro(masks, maps))
        expected = average_precision_score(masks.reshape(-1), maps.reshape(-1))
        assert metrics["pixel_average_precision"] == pytest.approx(expected)


def test_pixels_are_counted_in_parts(monkeypatch):
    generator = np.random.default_rng(0)
    masks = (generator.random((3, 8, 9)) < 0.4).astype(np.uint8)
    maps = generator.random((3, 8, 9)).astype(np.float32)
    whole = compute_pixel_metrics(masks, maps)
    monkeypatch.setattr("loupe.evaluation.localization.PIXELS_AT_ONCE", 7)
    assert compute_pixel_metrics(masks, maps) == pytest.approx(whole)


def test_perfect_maps_have_one_and_wrong_ones_nothing():
    masks, _ = draw(0)
    perfect, wrong = (compute_pixel_metrics(masks, (sign * masks).astype(np.float32)) for sign in (1.0, -1.0))
    assert list(perfect.values()) == pytest.approx([1, 1, 1])
    assert wrong["pixel_auroc"] == wrong["aupro"] == 0


def test_maps_that_are_all_alike_are_worth_a_coin():
    masks, maps = draw(0)
    metrics = compute_pixel_metrics(masks, np.ones_like(maps))
    assert metrics["pixel_auroc"] == 0.5
    assert metrics["aupro"] == pytest.approx(LARGEST_RATE / 2)


def test_a_small_region_counts_as_much_as_a_large_one():
    masks, maps = np.zeros((1, 8, 8), np.uint8), np.zeros((1, 8, 8), np.float32)
    masks[0, :5, :5], masks[0, 7, 7] = 1, 1
    small, large = maps.copy(), maps.copy()
    small[0, 7, 7], large[0, :5, :5] = 1.0, 1.0
    found_small, found_large = (compute_pixel_metrics(masks, one) for one in (small, large))
    assert found_small["aupro"] == pytest.approx(found_large["aupro"])
    assert found_small["pixel_auroc"] < found_large["pixel_auroc"]


def test_nothing_is_rescaled_but_order_alone_counts():
    masks, maps = draw(1, decimals=6)
    assert compute_pixel_metrics(masks, maps) == compute_pixel_metrics(masks, 1000 * maps - 7)


def test_the_arguments_stay_as_they_are():
    masks, maps = draw(0)
    before = masks.copy(), maps.copy()
    compute_pixel_metrics(masks, maps)
    compute_pixel_interval(masks, maps, 0)
    np.testing.assert_array_equal(before[0], masks)
    np.testing.assert_array_equal(before[1], maps)


def resample_exactly(masks, maps, seed, num_resamples):
    """The AUROC of images that were drawn with replacement, and put together in earnest."""
    generator, values = np.random.default_rng(seed), []
    for _ in range(num_resamples):
        rows = generator.integers(len(maps), size=len(maps))
        values.append(compute_pixel_metrics(masks[rows], maps[rows])["pixel_auroc"])
    return np.array(values)


def test_the_interval_is_that_of_resampled_images():
    generator = np.random.default_rng(0)
    masks, maps = draw(0, (20, 12, 12), decimals=6)
    maps += generator.normal(0, 0.3, (20, 1, 1)).astype(np.float32)  # images differ, so that pixels are not independent
    interval = compute_pixel_interval(masks, maps, 0)
    expected = np.quantile(resample_exactly(masks, maps, 1, 1000), [0.025, 0.975])
    np.testing.assert_allclose(interval, expected, atol=0.01)
    assert interval.low < compute_pixel_metrics(masks, maps)["pixel_auroc"] < interval.high


@pytest.mark.parametrize("num_bins", [10, 100])
@pytest.mark.parametrize("decimals", [1, 6])
def test_a_resample_in_bins_is_within_one_in_their_number_of_the_exact_one(num_bins, decimals):
    masks, maps = draw(3, (12, 20, 20), decimals)
    normal, anomalous = count_pixels(masks, maps, num_bins)
    weights = np.random.default_rng(0).multinomial(12, np.full(12, 1 / 12), 30)
    binned = compute_grouped_auroc(weights @ normal, weights @ anomalous)
    exact = [
        compute_pixel_metrics(masks.repeat(one, axis=0), maps.repeat(one, axis=0))["pixel_auroc"] for one in weights
    ]
    np.testing.assert_allclose(binned, exact, atol=1 / num_bins)
    assert normal.sum() + anomalous.sum() == maps.size


@pytest.mark.parametrize("value", [0, 1])
def test_pixels_of_one_kind_have_no_figures_and_no_interval(value):
    masks, maps = np.full((2, 3, 3), value, np.uint8), np.zeros((2, 3, 3), np.float32)
    assert np.isnan(list(compute_pixel_metrics(masks, maps).values())).all()
    assert np.isnan(compute_pixel_interval(masks, maps, 0)).all()


def test_no_pixels_have_no_figures():
    none = np.zeros((0, 3, 3))
    assert np.isnan(list(compute_pixel_metrics(none.astype(np.uint8), none.astype(np.float32)).values())).all()
