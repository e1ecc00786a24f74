"""Drift: exact tests that keep their rate, statistics against slow references, and effects that mean what they say."""

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scipy.stats import anderson_ksamp, binom, mannwhitneyu, norm
from sklearn.metrics import pairwise_distances, roc_auc_score

from loupe.config import Drift
from loupe.evaluation.bootstrap import Interval
from loupe.evaluation.drift import (
    EMBEDDING,
    SCORE,
    Comparison,
    Sample,
    build_kernel,
    compute_anderson_darling,
    compute_effect,
    compute_p_value,
    compute_separation,
    compute_smallest_effect,
    compute_witness,
    deal,
    divide_into_folds,
    judge_drift,
    reject,
)
from loupe.models.classifiers import get_data_config
from loupe.models.detectors.features import FeatureConfig, FeatureExtractor
from loupe.models.weights import build_backbone

RULES = Drift(false_alarm_rate=0.01, num_permutations=499, min_images=20, max_images=1000, num_pictures=4)
FLOWERS = Path(os.environ.get("LOUPE_DATASETS", "")) / "flowers_small"  # a folder a kind, 40 photos or more each
BACKBONE, SIDE, NUM_DRAWN = "tf_efficientnet_lite0", 96, 48


def draw_normal(num_images, num_values, seed, shift=0.0, scale=1.0):
    """Gaussian embeddings, and scores that move with them."""
    generator = np.random.default_rng(seed)
    embeddings = generator.normal(shift, scale, (num_images, num_values)).astype(np.float32)
    return Sample(embeddings, generator.normal(shift, scale, num_images))


def name_recent(num_reference, num_recent):
    return np.arange(num_reference + num_recent) >= num_reference


@pytest.fixture(scope="module")
def false_alarms():
    """p-values of 200 checks of images that have not changed: heavy-tailed embeddings, tied scores, unequal numbers."""
    is_recent, found = name_recent(30, 22), {EMBEDDING: [], SCORE: []}
    for seed in range(200):
        generator = np.random.default_rng([7, seed])
        deals = deal(is_recent, np.arange(len(is_recent)), 99, seed)
        kernel = build_kernel(pairwise_distances(generator.standard_t(2, (len(is_recent), 6))))
        found[EMBEDDING].append(compute_p_value(compute_separation(kernel, deals, np.arange(len(kernel)))))
        scores = generator.gamma(2, 1, len(is_recent)).round(1)
        found[SCORE].append(compute_p_value(compute_anderson_darling(scores, deals)))
    return {name: np.array(values) for name, values in found.items()}


@pytest.mark.parametrize("name", [EMBEDDING, SCORE])
@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5])
def test_each_test_raises_false_alarms_at_its_rate(false_alarms, name, rate):
    low, high = binom.interval(0.999, 200, rate)
    assert low <= (false_alarms[name] <= rate).sum() <= high


@pytest.mark.parametrize("rate", [0.02, 0.05, 0.1, 0.2])
def test_both_tests_together_raise_false_alarms_at_the_stated_rate(false_alarms, rate):
    rows = [dict(zip(false_alarms, pair, strict=True)) for pair in zip(*false_alarms.values(), strict=True)]
    num_alarms = sum(bool(reject(row, rate)) for row in rows)
    assert num_alarms <= binom.ppf(0.999, 200, rate)
    assert num_alarms >= binom.ppf(0.001, 200, rate / 2)


@given(
    st.lists(st.integers(-3, 3), min_size=4, max_size=14),
    st.integers(1, 3),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_the_statistic_of_scores_is_scholz_and_stephens(scores, num_recent, seed):
    scores, is_recent = np.array(scores, float), name_recent(len(scores) - num_recent, num_recent)
    deals = deal(is_recent, np.arange(len(is_recent)), 4, seed)
    for is_chosen, found in zip(deals, compute_anderson_darling(scores, deals), strict=True):
        slow = 0.0
        for sample in (scores[is_chosen], scores[~is_chosen]):
            for value in np.unique(scores)[:-1]:
                below, own = (scores <= value).sum(), (sample <= value).sum()
                gap = (len(scores) * own - len(sample) * below) ** 2 / (below * (len(scores) - below))
                slow += (scores == value).sum() * gap / len(sample) / len(scores)
        assert found == pytest.approx(slow, abs=1e-9)


def draw_parts(num_parts, seed):
    """Four photos of each part, which are alike, and their groups."""
    generator, groups = np.random.default_rng(seed), np.repeat(np.arange(num_parts), 4)
    embeddings = generator.normal(0, 1, (num_parts, 5))[groups] + generator.normal(0, 0.3, (4 * num_parts, 5))
    return Sample(embeddings, embeddings[:, 0], groups)


def test_several_images_of_a_part_are_dealt_together_and_raise_no_more_false_alarms():
    """The same images raise them nearly always where each is taken for one of its own."""
    is_recent, groups, found = name_recent(4 * 14, 4 * 10), np.repeat(np.arange(24), 4), {"known": [], "not known": []}
    for seed in range(100):
        kernel = build_kernel(pairwise_distances(draw_parts(24, [11, seed]).embeddings))
        for name, used in (("known", groups), ("not known", np.arange(96))):
            deals = deal(is_recent, used, 99, seed)
            found[name].append(compute_p_value(compute_separation(kernel, deals, used)) <= 0.1)
    assert binom.ppf(0.001, 100, 0.1) <= sum(found["known"]) <= binom.ppf(0.999, 100, 0.1)
    assert sum(found["not known"]) > 80


def test_groups_have_one_name_a_deal_and_one_fold():
    is_recent, groups = name_recent(40, 40), np.repeat(np.arange(20), 4)
    for one in deal(is_recent, groups, 50, 0):
        assert (one.reshape(20, 4).all(axis=1) == one.reshape(20, 4).any(axis=1)).all()
        assert one.sum() == 40
    for fold in divide_into_folds(is_recent, groups, 0):
        assert all(np.isin(np.flatnonzero(groups == group), fold).all() for group in groups[fold])


def test_a_shift_of_parts_is_found_by_their_groups():
    reference, recent = draw_parts(20, 0), draw_parts(15, 1)
    moved = Sample(recent.embeddings + 1.5, recent.scores, recent.groups)
    judgement = judge_drift(reference, moved, RULES.model_copy(update={"min_images": 15}), 0)
    assert judgement.comparisons[EMBEDDING].is_drifted
    assert (judgement.num_reference_groups, judgement.num_recent_groups) == (20, 15)
    assert not judge_drift(reference, moved, RULES, 0).is_decided  # 60 images of 15 parts are 15


@pytest.mark.filterwarnings("ignore:p-value (capped|floored)")
def test_the_statistic_of_scores_ranks_samples_as_scipy_does():
    generator, is_recent = np.random.default_rng(0), name_recent(20, 15)
    ours, theirs = [], []
    for shift in np.linspace(0, 2, 9):
        scores = generator.normal(0, 1, 35).round(1) + shift * is_recent
        ours.append(compute_anderson_darling(scores, is_recent[None])[0])
        theirs.append(anderson_ksamp([scores[~is_recent], scores[is_recent]], variant="right").statistic)
    slope, intercept = np.polyfit(ours, theirs, 1)  # SciPy's is normalised, the same for all samples of a size
    assert slope * np.array(ours) + intercept == pytest.approx(np.array(theirs), abs=1e-6)


def test_the_statistic_of_embeddings_is_that_of_the_regularised_kernel():
    generator, is_recent = np.random.default_rng(1), name_recent(9, 6)
    kernel, deals = (
        build_kernel(pairwise_distances(generator.normal(size=(15, 3)))),
        deal(name_recent(9, 6), np.arange(15), 5, 0),
    )
    centring = np.eye(15) - 1 / 15
    values, vectors = np.linalg.eigh(centring @ kernel @ centring)
    hat = vectors @ np.diag(values / (values + 1)) @ vectors.T
    slow = []
    for is_chosen in deals:
        target = is_chosen - is_recent.mean()
        slow.append(sum(hat[i, j] * target[i] * target[j] for i in range(15) for j in range(15) if i != j))
    assert compute_separation(kernel, deals, np.arange(len(kernel))) == pytest.approx(np.array(slow), abs=1e-9)


def test_deals_keep_the_numbers_and_begin_with_the_real_one():
    is_recent = name_recent(12, 5)
    deals = deal(is_recent, np.arange(len(is_recent)), 200, 3)
    assert (deals[0] == is_recent).all()
    assert set(deals.sum(axis=1)) == {5}
    assert len(np.unique(deals, axis=0)) > 150
    assert abs(deals[1:].mean(axis=0) - 5 / 17).max() < 0.15
    assert (deals == deal(is_recent, np.arange(len(is_recent)), 200, 3)).all()


def test_a_p_value_counts_the_real_deal_and_ties_of_rounding():
    assert compute_p_value(np.array([3.0, 1.0, 2.0, 0.0])) == 0.25
    assert compute_p_value(np.array([3.0, 3.0 - 1e-12, 2.0, 0.0])) == 0.5
    assert compute_p_value(np.array([0.0, 3.0, 2.0, 1.0])) == 1


@pytest.mark.parametrize(
    ("p_values", "found"),
    [
        ({"a": 0.006, "b": 0.2}, set()),
        ({"a": 0.2, "b": 0.005}, {"b"}),
        ({"a": 0.005, "b": 0.01}, {"a", "b"}),
        ({"a": 0.005, "b": 0.011}, {"a"}),
        ({"a": 0.01}, {"a"}),
    ],
)
def test_tests_are_judged_by_holm(p_values, found):
    assert reject(p_values, 0.01) == found


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_the_witness_never_saw_what_it_judges(shift):
    """Fitted by hand to all other folds; without a drift it can't tell, which a witness that had seen them could."""
    reference, recent = draw_normal(60, 4, 0).embeddings, draw_normal(45, 4, 1, shift).embeddings
    is_recent = name_recent(60, 45)
    kernel = build_kernel(pairwise_distances(np.concatenate([reference, recent]).astype(float)))
    folds = divide_into_folds(is_recent, np.arange(len(is_recent)), 0)
    witness = compute_witness(kernel, is_recent, folds)
    targets = is_recent - is_recent.mean()
    for fold in folds:
        others = np.setdiff1d(np.arange(105), fold)
        weights = np.linalg.solve(kernel[np.ix_(others, others)] + np.eye(len(others)), targets[others])
        assert witness[fold] == pytest.approx(kernel[np.ix_(fold, others)] @ weights, abs=1e-9)
        assert abs(is_recent[fold].mean() - is_recent.mean()) < 0.1
    assert sorted(np.concatenate(folds)) == list(range(105))
    effect = compute_effect(is_recent, witness, np.arange(len(is_recent)), folds, 0)[0]
    assert effect > 0.7 if shift else 0.35 < effect < 0.65


def test_without_drift_the_effect_of_embeddings_is_chance_on_average():
    effects = []
    for seed in range(40):
        sample, is_recent = draw_normal(60, 5, [3, seed]).embeddings, name_recent(35, 25)
        folds = divide_into_folds(is_recent, np.arange(len(is_recent)), seed)
        witness = compute_witness(build_kernel(pairwise_distances(sample.astype(float))), is_recent, folds)
        effects.append(np.mean([roc_auc_score(is_recent[fold], witness[fold]) for fold in folds]))
    assert np.mean(effects) == pytest.approx(0.5, abs=4 * np.std(effects) / 40**0.5)


def test_the_effect_of_scores_is_the_part_of_pairs_and_lies_in_its_interval():
    generator, is_recent = np.random.default_rng(2), name_recent(40, 30)
    scores = (generator.normal(size=70) + 0.5 * is_recent).round(1)
    effect, interval = compute_effect(is_recent, scores, np.arange(len(is_recent)), [np.arange(70)], 0)
    assert effect == pytest.approx(mannwhitneyu(scores[is_recent], scores[~is_recent]).statistic / (40 * 30))
    assert interval.low < effect < interval.high
    assert 0.1 < interval.high - interval.low < 0.4


def test_intervals_cover_the_true_effect():
    """AUROC of two normal distributions one standard deviation apart is 0.760."""
    is_recent, covered = name_recent(60, 40), 0
    for seed in range(60):
        scores = np.random.default_rng([5, seed]).normal(size=100) + is_recent
        interval = compute_effect(is_recent, scores, np.arange(len(is_recent)), [np.arange(100)], seed)[1]
        covered += interval.low <= 0.7602 <= interval.high
    assert binom.ppf(0.001, 60, 0.93) <= covered


def test_a_shift_is_found_with_its_effect_and_a_scale_by_the_scores_alone():
    reference = draw_normal(150, 8, 0)
    shifted = judge_drift(reference, draw_normal(100, 8, 1, shift=0.6), RULES, 0)
    assert shifted.is_drifted
    assert all(one.p_value == 1 / 500 for one in shifted.comparisons.values())
    assert shifted.comparisons[EMBEDDING].effect > 0.75
    assert shifted.comparisons[EMBEDDING].strength == "strongly"
    assert shifted.comparisons[SCORE].effect == pytest.approx(0.66, abs=0.08)  # of d = 0.6
    spread = judge_drift(
        reference, Sample(draw_normal(100, 8, 2).embeddings, draw_normal(100, 8, 3, 0, 3.0).scores), RULES, 0
    )
    assert {name: one.is_drifted for name, one in spread.comparisons.items()} == {EMBEDDING: False, SCORE: True}
    assert spread.comparisons[SCORE].interval.low < 0.5 < spread.comparisons[SCORE].interval.high


def test_what_moved_most_is_what_is_new():
    reference, recent = draw_normal(120, 8, 0).embeddings, draw_normal(80, 8, 1).embeddings
    recent[10:30] += 3
    judgement = judge_drift(Sample(reference), Sample(recent), RULES, 0)
    assert list(judgement.comparisons) == [EMBEDDING]
    assert set(judgement.find_moved_most(15)) <= set(range(10, 30))
    strangeness = judgement.compute_strangeness()
    assert strangeness[10:30].min() > 0.9
    assert all(strangeness[one] >= strangeness[other] for one, other in pairwise(judgement.find_moved_most(80)))
    for position, nearest in enumerate(judgement.nearest):
        assert nearest == np.linalg.norm(reference - recent[position], axis=1).argmin()


def test_the_same_seed_gives_the_same_judgement():
    one, other = (judge_drift(draw_normal(40, 3, 0), draw_normal(30, 3, 1, 0.4), RULES, 5) for _ in range(2))
    assert one.comparisons == other.comparisons
    assert (one.witness == other.witness).all()


@pytest.mark.parametrize(("num_reference", "num_recent"), [(19, 50), (50, 19)])
def test_of_too_few_images_nothing_is_said(num_reference, num_recent):
    judgement = judge_drift(draw_normal(num_reference, 3, 0), draw_normal(num_recent, 3, 1, 9.0), RULES, 0)
    assert (judgement.is_decided, judgement.is_drifted) == (False, False)
    assert judgement.find_moved_most(5) == []


def test_images_that_are_all_alike_are_no_drift():
    alike = Sample(np.ones((25, 4), np.float32), np.ones(25))
    judgement = judge_drift(alike, alike, RULES, 0)
    assert all(one.p_value == 1 and one.effect == 0.5 for one in judgement.comparisons.values())


def test_the_smallest_effect_is_found_four_times_in_five():
    effect = compute_smallest_effect(60, 40, 0.05)
    generator, shift = np.random.default_rng(0), float(np.sqrt(2) * norm.ppf(effect))
    found = sum(
        mannwhitneyu(generator.normal(shift, 1, 40), generator.normal(0, 1, 60)).pvalue <= 0.05 for _ in range(400)
    )
    assert found / 400 == pytest.approx(0.8, abs=0.07)
    assert compute_smallest_effect(20, 20, 0.005) > compute_smallest_effect(1000, 1000, 0.005) > 0.5


@pytest.mark.parametrize(
    ("effect", "word"), [(0.5, "hardly"), (0.6, "slightly"), (0.35, "moderately"), (0.9, "strongly"), (0.0, "strongly")]
)
def test_effects_have_words(effect, word):
    assert Comparison(0.5, effect, Interval(0, 1), False).strength == word


def embed(images):
    """The means of a backbone's features at all its levels, which is what a detector has of an image."""
    data = get_data_config(BACKBONE)
    extractor = FeatureExtractor(
        FeatureConfig(BACKBONE, (SIDE, SIDE), (SIDE, SIDE), data.mean, data.std), build_backbone(BACKBONE, "package")
    )
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    with torch.inference_mode():
        parts = [[level.mean(dim=(2, 3)) for level in extractor(batch)] for batch in pixels.split(16)]
    return torch.cat([torch.cat(levels, dim=1) for levels in parts]).numpy()


def load_flowers(kind):
    return [ImageOps.fit(Image.open(path).convert("RGB"), (SIDE, SIDE)) for path in sorted((FLOWERS / kind).iterdir())]


def draw_scenes(num_images, seed):
    """Discs on a ground with a grain, all in colours of their own."""
    generator, scenes = np.random.default_rng(seed), []
    rows, columns = np.mgrid[:SIDE, :SIDE]
    for _ in range(num_images):
        scene = generator.normal(generator.integers(60, 180, 3), 12, (SIDE, SIDE, 3))
        for _ in range(3):
            row, column, radius = generator.integers([8, 8, 6], [SIDE - 8, SIDE - 8, 24])
            scene[(rows - row) ** 2 + (columns - column) ** 2 < radius**2] = generator.integers(0, 256, 3)
        scenes.append(Image.fromarray(scene.clip(0, 255).astype(np.uint8)))
    return scenes


def blur(images):
    return [image.filter(ImageFilter.GaussianBlur(1.5)) for image in images]


def brighten(images):
    return [ImageEnhance.Brightness(image).enhance(1.6) for image in images]


def judge(reference, recent):
    return judge_drift(Sample(reference), Sample(recent), RULES, 0)


@pytest.fixture(scope="module")
def scenes():
    """Drawn images, and the embeddings of the first half."""
    images = draw_scenes(2 * NUM_DRAWN, 0)
    return images[NUM_DRAWN:], embed(images[:NUM_DRAWN])


@pytest.mark.parametrize("change", [blur, brighten])
def test_changed_drawn_images_are_found(scenes, change):
    images, reference = scenes
    judgement = judge(reference, embed(change(images)))
    assert judgement.is_drifted
    assert judgement.comparisons[EMBEDDING].effect > 0.8


def test_drawn_images_of_the_same_kind_are_not(scenes):
    images, reference = scenes
    assert not judge(reference, embed(images)).is_drifted


@pytest.fixture(scope="module")
def flowers():
    """Of two kinds of flowers one half each, and the embeddings of the other."""
    if not FLOWERS.exists():
        pytest.skip("there are no photos of flowers here: LOUPE_DATASETS names the folder that has flowers_small")
    images = load_flowers("daisy") + load_flowers("roses")
    return images[1::2], embed(images[::2])


@pytest.mark.parametrize("change", [blur, brighten])
def test_blur_and_light_are_found_in_photos(flowers, change):
    images, reference = flowers
    assert judge(reference, embed(change(images))).is_drifted


def test_photos_of_the_same_kinds_are_not_drifted(flowers):
    images, reference = flowers
    assert not judge(reference, embed(images)).is_drifted


def test_a_new_kind_of_flower_is_found_and_is_what_moved_most(flowers):
    images, reference = flowers
    new = load_flowers("sunflowers")[:20]
    judgement = judge(reference, embed(images[:20] + new))
    assert judgement.is_drifted
    assert sum(position >= 20 for position in judgement.find_moved_most(10)) >= 8
