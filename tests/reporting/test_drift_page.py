"""The page on drift, as a browser shows it."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from loupe.config import Drift
from loupe.drift_report import Images, Report, describe_verdict, render_report
from loupe.evaluation.drift import judge_drift
from loupe.reporting.page import save_page

NUM_REFERENCE, NUM_RECENT, NUM_MOVED = 40, 30, 5
HOSTILE = "<script>alert(1)</script>\"><img src=x onerror=alert(2)>'.png"
RULES = Drift(false_alarm_rate=0.01, num_permutations=199, min_images=20, max_images=1000, num_pictures=4)


def draw_images(num_images, seed, shift, folder, has_scores=True):
    """The last NUM_MOVED moved, and the last of all has a hostile name."""
    generator, moved = np.random.default_rng(seed), np.arange(num_images) >= num_images - NUM_MOVED
    embeddings = generator.normal(0, 1, (num_images, 4)) + shift * (0.5 + 3 * moved[:, None])
    paths = [f"{number}.png" for number in range(num_images - 1)] + [HOSTILE]
    rows = pd.DataFrame({"path": paths, "embedding": list(embeddings)})
    return Images(rows.assign(anomaly_score=generator.normal(shift, 1, num_images)) if has_scores else rows, folder)


def build_report(folder, shift, num_recent=NUM_RECENT, has_scores=True):
    reference = draw_images(NUM_REFERENCE, 0, 0, folder, has_scores)
    recent = draw_images(num_recent, 1, shift, folder, has_scores)
    judgement = judge_drift(reference.sample, recent.sample, RULES, 0)
    return Report("<b>pets</b>/1", Path("a & b.parquet"), reference, recent, 3, 1200, RULES, judgement)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, write):
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(NUM_REFERENCE):
        write(folder / f"{number}.png", number)
    return folder


@pytest.fixture(scope="module")
def drifted(pictures):
    return build_report(pictures, 1.0)


@pytest.fixture(scope="module")
def page(drifted, tmp_path_factory):
    path = tmp_path_factory.mktemp("reports") / "drift.html"
    save_page(render_report(drifted), path)
    return path


def test_verdict_and_figures_are_those_of_the_tests(drifted, page, show):
    shown, *_ = show(page)
    assert shown.locator(".verdict.warning").inner_text() == describe_verdict(drifted)
    rows = shown.locator(".tests tbody tr").all()
    for row, one in zip(rows, drifted.judgement.comparisons.values(), strict=True):
        text = row.inner_text()
        assert f"{one.effect:.3f}" in text
        assert f"{one.interval.low:.3f} to {one.interval.high:.3f}" in text
        assert "yes, " in text
    head = shown.locator("header").inner_text()
    assert "1,200 more recent images were not drawn, as at most 1,000 a side are compared. 3 could not be read" in head


def test_what_moved_most_stands_beside_the_nearest_reference(drifted, page, show):
    shown, *_ = show(page)
    cards = shown.locator("#moved .pair").all()
    assert len(cards) == RULES.num_pictures
    for card, position in zip(cards, drifted.judgement.find_moved_most(RULES.num_pictures), strict=True):
        assert position >= NUM_RECENT - NUM_MOVED
        nearest = drifted.judgement.nearest[position]
        paths = [drifted.recent.rows["path"].iloc[position], drifted.reference.rows["path"].iloc[nearest]]
        assert card.locator(".path").all_inner_texts() == paths
        left, right = (frame.bounding_box() for frame in card.locator(".frame").all())
        assert left["y"] == right["y"]
        assert left["width"] == right["width"]
    assert shown.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0 && image.alt)")
    hostile = [card for card in cards if HOSTILE in card.inner_text()]
    assert all("no picture" in card.inner_text() for card in hostile)


def test_both_kinds_are_drawn_in_each_histogram(drifted, page, show):
    shown, *_ = show(page)
    charts = shown.locator(".chart > svg").all()
    assert len(charts) == 2
    for chart in charts:
        for side, number in (("upper", NUM_REFERENCE), ("lower", NUM_RECENT)):
            texts = chart.locator(f".{side} title").all_text_contents()
            assert sum(int(text.split()[0]) for text in texts) == number


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_window(page, show, width, scheme):
    shown, *_ = show(page, width, scheme)
    assert shown.evaluate("document.documentElement.scrollWidth") == width


def test_the_page_asks_for_nothing_and_hostile_names_are_text(page, show):
    shown, requested, told = show(page)
    assert [url for url in requested if not url.startswith("data:")] == [page.as_uri()]
    assert told == []
    assert shown.locator("script, [onerror]").count() == 0
    assert shown.locator("h1").inner_text() == "<b>pets</b>/1"


def test_sections_and_files_that_the_page_points_to_are_there(page):
    text = page.read_text(encoding="utf-8")
    links = set(re.findall(r'href="([^"]+)"', text))
    assert {link for link in links if link[0] != "#"} == {"data:,", "drift.json"}
    assert all(f'id="{link[1:]}"' in text for link in links if link[0] == "#")


def test_where_no_drift_was_found_the_page_does_not_say_there_is_none(pictures):
    text = render_report(build_report(pictures, 0.0))
    assert 'class="verdict ok"' in text
    assert "No drift was found: these are merely the recent images that look least like the reference." in text
    assert "weaker drift may well be overlooked" in text


def test_of_too_few_images_there_is_no_figure(pictures):
    text = render_report(build_report(pictures, 1.0, num_recent=12))
    assert 'class="verdict warning">Too few images to say' in text
    assert not any(f'id="{name}"' in text for name in ("tests", "moved", "charts"))


def test_without_scores_there_is_one_test_and_one_chart(pictures):
    text = render_report(build_report(pictures, 1.0, has_scores=False))
    assert text.count("<svg") == 1
    assert "anomaly score (raw)" not in text
    assert "score nan" not in text


def test_without_the_files_the_page_has_names_alone():
    text = render_report(build_report(None, 1.0))
    assert text.count("no picture") == 2 * RULES.num_pictures
