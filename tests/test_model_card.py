import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from markdown_it import MarkdownIt

from loupe.data.manifest import save_table
from loupe.errors import DataError
from loupe.model_card import (
    MOST_LABELS,
    Figure,
    ModelCard,
    attach_model_cards,
    build_model_card,
    describe_limits,
    escape_markdown,
    list_figures,
)
from loupe.stages.entry import save_json
from loupe.stages.files import CALIBRATION, LISTING, MANIFEST, MODELS, PREPARED, REPORTS, RUN, VALIDATION
from loupe.tracking.audit import Entry, append_entry, create_model
from loupe.tracking.records import CARD
from loupe.tracking.runs import connect, log_results, start_run

GEOMETRY = {
    "height": 306, "width": 250, "channels": 1, "crop_height": 306, "crop_width": 250,
    "input_height": 352, "input_width": 288, "fit": "squash", "interpolation": "bilinear",
}  # fmt: skip
CONFIG = {
    "geometry": GEOMETRY,
    "normal_label": "good",
    "weights": "ImageNet, package some_package (Apache-2.0)",
    "threshold": 19.0,
    "false_alarm_rate": 0.05,
}
IMAGES = {"good": (240, 30, 40, 102), "crack": (0, 0, 0, 7), "fray": (0, 0, 0, 25)}
CARD_VALUES = ModelCard(
    model="tiles-detector",
    version="3",
    kind="An anomaly detector: padim",
    run_id="0123456789abcdef",
    trained="2030-01-02 03:04:05",
    commit="c0ffee",
    is_clean=False,
    data="tiles",
    layout="mvtec",
    num_set_aside=2,
    data_digest="d1935",
    splits=("train", "val", "calibration", "test"),
    images=IMAGES,
    num_test=134,
    figures={"image_auroc": Figure(0.9, 0.85, 0.94), "best_f1": Figure(0.8)},
    threshold="An image is flagged where its score is above 19.",
    limits=["It was fitted to images of good alone."],
    latency_ms=12.34,
    num_bytes=12_600_000,
    device="a CPU",
    licence="Free.",
)


def render(text):
    """As a page would show it."""
    return MarkdownIt("commonmark").enable("table").render(text)


def read_table(page, heading):
    """Rows of the table below a heading, as text."""
    part = page.partition(f">{heading}</h2>")[2].partition("<h2")[0]
    rows = [row.split("</t") for row in part.split("<tr>")[1:]]
    return [[cell.rpartition(">")[2] for cell in row if cell.rpartition(">")[2].strip()] for row in rows]


def test_every_part_is_there_and_tables_are_tables():
    page = render(build_model_card(CARD_VALUES))
    assert "<h1>tiles-detector, version 3</h1>" in page
    assert [part.partition("<")[0] for part in page.split("<h2>")[1:]] == [
        "How to use it", "Data", "Figures", "Threshold", "Limits", "Speed and size", "Licence",
    ]  # fmt: skip
    assert read_table(page, "Data") == [
        ["label", "train", "val", "calibration", "test"],
        ["good", "240", "30", "40", "102"],
        ["crack", "0", "0", "0", "7"],
        ["fray", "0", "0", "0", "25"],
    ]
    assert read_table(page, "Figures")[1:] == [["image_auroc", "0.9000", "0.8500 to 0.9400"], ["best_f1", "0.8000"]]
    for wanted in ("with changes", "2 files were set aside", "12.3 ms", "12.6 MB", "models:/tiles-detector/3"):
        assert wanted in page


def test_a_classifier_has_no_threshold_and_a_run_without_git_says_so():
    page = render(build_model_card(replace(CARD_VALUES, threshold=None, commit=None)))
    assert "Threshold" not in page
    assert "outside of a git repository" in page


def test_names_of_folders_are_shown_as_they_are():
    label = "a|b *c* <script>alert(1)</script> & `d` [e](f)"
    page = render(build_model_card(replace(CARD_VALUES, images={label: (1, 2, 3, 4)})))
    assert "<script>" not in page
    assert "a|b *c* &lt;script&gt;alert(1)&lt;/script&gt; &amp; `d` [e](f)</td>" in page
    assert escape_markdown("two\nlines") == "two lines"


def test_many_labels_are_counted_and_not_all_shown():
    page = render(build_model_card(replace(CARD_VALUES, images={f"label{i}": (1, 1, 1, 1) for i in range(1000)})))
    assert len(read_table(page, "Data")) == 1 + MOST_LABELS
    assert "and 960 more labels" in page


def test_figures_have_their_intervals_and_neither_counts_nor_single_labels():
    metrics = {
        "detector/test/image_auroc": 0.9, "detector/test/image_auroc_low": 0.8, "detector/test/image_auroc_high": 0.95,
        "detector/test/f1": 0.5, "detector/test/image_auroc/crack": 0.7, "detector/test/num_images": 9,
        "detector/threshold": 3.0, "detector/train/num_images": 7,
    }  # fmt: skip
    assert list_figures(metrics, "detector") == {"image_auroc": Figure(0.9, 0.8, 0.95), "f1": Figure(0.5)}


def build_manifest(widths):
    return pd.DataFrame({"width": widths, "height": [306] * len(widths)})


def test_limits_follow_from_the_data():
    findings = [
        {"sentence": "Every file decodes", "num_failing": 0},
        {"sentence": "Near-duplicates are not parted", "num_failing": 13},
    ]
    limits = "\n".join(describe_limits("detector", CONFIG, IMAGES, build_manifest([250, 250]), findings))
    assert "images of 250 x 306 pixels, in grey, seen at 288 x 352" in limits
    assert "fitted to images of good alone" in limits
    assert "none of its 134 test images showed may still occur in up to 2.21% of new ones" in limits
    assert "crack (7)" in limits
    assert "fray" not in limits
    assert "Near-duplicates are not parted (13 files)" in limits
    assert "Every file decodes" not in limits
    limits = "\n".join(describe_limits("classifier", CONFIG, {"cat": (5, 5, 5, 50)}, build_manifest([200, 250]), []))
    assert "of 200 x 306 to 250 x 306 pixels" in limits
    assert "gives one of them to any image" in limits
    assert "cat (5) were few to learn from" in limits
    assert "few to test on" not in limits


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A store, and what the stages leave of a detector; gives the client and the run's id."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    data_set = {"name": "tiles", "source": "tiles", "layout": "mvtec", "num_images": 20, "num_quarantined": 1}
    files = {
        LISTING: data_set,
        MODELS / "detector" / "config.json": CONFIG,
        REPORTS / "metrics" / "detector.json": {"detector/test/image_auroc": 0.75},
        VALIDATION: {"findings": []},
    }
    for path, values in files.items():
        save_json(values, path)
    splits = ["train"] * 10 + ["calibration"] * 4 + ["test"] * 6
    save_table(pd.DataFrame({"label": "good", "split": splits, "path": "a.png"}), PREPARED / "detector/index.parquet")
    save_table(build_manifest([250] * 20), MANIFEST)
    save_table(pd.DataFrame({"anomaly_score": np.arange(20.0)}), MODELS / "detector" / CALIBRATION)
    client = connect("tiles")
    params, tags = {"train_detector": {"model": "padim"}}, {"task": "detector", "data_digest": "d1"}
    with start_run("detector", params, tags) as run_id:
        pass
    save_json({"run_id": run_id}, MODELS / "detector" / RUN)
    log_results(client, run_id, metrics={"detector/test/image_auroc": 0.75})
    create_model(client, "tiles-detector", client.get_run(run_id).info.experiment_id)
    client.create_model_version("tiles-detector", tmp_path.as_uri(), run_id)
    figures = {"latency_ms": 7.5, "num_bytes": 2_000_000}
    append_entry(client, "tiles-detector", Entry("kept", "1", None, None, "me", "why", figures=figures), 1)
    return client, run_id


def test_a_card_is_with_the_run_and_the_version(trained, tmp_path):
    client, run_id = trained
    attach_model_cards()
    description = client.get_model_version("tiles-detector", "1").description
    path = client.download_artifacts(run_id, CARD, str(tmp_path))
    assert Path(path).read_text(encoding="utf-8") == description
    assert description.startswith("# tiles-detector, version 1\n")
    for wanted in ("An anomaly detector: padim", "| good | 10 | 0 | 4 | 6 |", "On 6 test images", "7.5 ms", "2.0 MB"):
        assert wanted in description
    assert "flagged where its score is above 19." in description
    assert "by 20 normal calibration images" in description
    assert json.loads((MODELS / "detector" / "config.json").read_text())["weights"].split("_")[0] in description


def test_a_card_without_figures_is_refused_in_one_sentence(trained):
    (REPORTS / "metrics" / "detector.json").unlink()
    with pytest.raises(DataError, match=r"detector\.json is missing, .*`dvc repro` writes it"):
        attach_model_cards()


def test_what_is_not_registered_has_no_card(trained):
    client, run_id = trained
    client.delete_model_version("tiles-detector", "1")
    attach_model_cards()
    assert CARD not in [entry.path for entry in client.list_artifacts(run_id)]
