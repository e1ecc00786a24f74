import pandas as pd
import pytest

from loupe.data.expectations import Finding, Images
from loupe.data.overview import MARKS, MOST_QUARANTINED, describe_data

NO_WORST = pd.DataFrame({"path": [], "reason": []}, dtype="str")
LEAKS = ["first", "second", "first_split", "second_split"]


def finding(mark, num_failing=1):
    severity = "warning" if mark == "warning" else "critical"
    return Finding(f"A {mark} one", severity, mark == "ok", 0 if mark == "ok" else num_failing, {})


@pytest.fixture
def describe(tabulate):
    """Describes the images of (content, label, given split) triples."""

    def describe(triples, findings=(), leaks=(), quarantine=(), **columns):
        images = Images(
            manifest=tabulate(triples).assign(**columns),
            quality=pd.DataFrame(),
            masks=pd.DataFrame(),
            quarantine=pd.DataFrame(quarantine, columns=["path", "label", "reason"], dtype="str"),
            leaks=pd.DataFrame(leaks, columns=LEAKS, dtype="str"),
        )
        return describe_data(images, findings, NO_WORST)

    return describe


def test_labels_are_counted_by_given_split_the_most_frequent_first(describe):
    triples = [("a", "cat", "test"), ("b", "dog", "train"), ("c", "dog", "test"), ("d", "dog", None)]
    overview = describe(triples)
    assert overview.splits == ["train", "test", "not given"]
    assert overview.labels.rows == [
        {"label": "dog", "train": 1, "test": 1, "not given": 1, "total": 3},
        {"label": "cat", "train": 0, "test": 1, "not given": 0, "total": 1},
    ]


def test_where_no_splits_are_given_none_can_leak(describe):
    overview = describe([("a", "cat", None), ("a", "cat", None)])
    assert overview.num_leaks is None
    assert overview.leaks.rows == []


def test_copies_near_duplicates_and_groups_across_given_splits_are_pairs_with_training_first(describe):
    triples = [("a", "cat", "test"), ("a", "cat", "train"), ("b", "cat", "train"), ("c", "cat", "test")]
    leaks = [
        ("0003_c.png", "0002_b.png", "test", "train"),
        ("0001_a.png", "0003_c.png", "train", "test"),
    ]
    overview = describe(triples, leaks=leaks, group=pd.Series([None, None, "g", "g"], dtype="str"))
    found = [(pair["first"], pair["first_split"], pair["second"], pair["kind"]) for pair in overview.leaks.rows]
    assert found == [
        ("0001_a.png", "train", "0000_a.png", "the same file"),
        ("0002_b.png", "train", "0003_c.png", "of one group"),
        ("0001_a.png", "train", "0003_c.png", "look alike"),
    ]
    assert overview.num_leaks == 3


def test_a_copy_within_one_split_is_no_leak(describe):
    assert describe([("a", "cat", "train"), ("a", "cat", "train"), ("b", "cat", "test")]).num_leaks == 0


def test_the_sample_has_some_of_each_label_whatever_the_order_of_the_rows(describe):
    triples = [(f"{label}{number}", label, None) for label in "abcdefghijklmn" for number in range(8)]
    overview, turned = describe(triples), describe(triples[::-1])
    assert [row["label"] for row in overview.samples.rows] == list("abcdefghijkl")
    assert {len(row["paths"]) for row in overview.samples.rows} == {6}
    assert overview.samples.num_more == 2
    contents = [[[path[5:] for path in row["paths"]] for row in one.samples.rows] for one in (overview, turned)]
    assert contents[0] == contents[1]


def test_a_content_is_sampled_once(describe):
    assert [row["paths"] for row in describe([("a", "cat", None)] * 3).samples.rows] == [["0000_a.png"]]


def test_a_long_quarantine_is_cut_and_its_rest_counted(describe):
    quarantine = [(f"{number}.png", "cat", "is empty") for number in range(MOST_QUARANTINED + 3)]
    overview = describe([("a", "cat", None)], quarantine=quarantine)
    assert (len(overview.quarantine.rows), overview.quarantine.num_more) == (MOST_QUARANTINED, 3)
    assert overview.num_quarantined == MOST_QUARANTINED + 3


def test_a_file_in_quarantine_is_named_and_not_pictured(describe):
    """It may be a link that leaves the folder."""
    bad = Finding("Every file decodes", "critical", False, 2, {"link.png": "leaves", "0000_a.png": "no"})
    overview = describe([("a", "cat", None)], [bad], quarantine=[("link.png", "cat", "leaves")])
    assert overview.pictured == ["0000_a.png"]


@pytest.mark.parametrize(
    ("marks", "verdict"),
    [
        ("ok ok", "These images can be trained on: all 2 expectations are met."),
        ("ok warning", "These images can be trained on; 1 warning deserves a look."),
        ("warning warning", "These images can be trained on; 2 warnings deserve a look."),
        ("warning critical", "These images can’t be trained on: 1 file fails “A critical one”."),
    ],
)
def test_the_verdict_says_whether_the_images_can_be_trained_on(describe, marks, verdict):
    overview = describe([("a", "cat", None)], [finding(mark) for mark in marks.split()])
    assert overview.verdict == verdict
    assert overview.mark == next(mark for mark in MARKS if mark in marks)


def test_images_without_labels_are_counted(describe):
    overview = describe([("a", None, None), ("b", None, None)], [finding("ok")])
    assert overview.labels.rows == [{"label": "no label", "not given": 2, "total": 2}]


def test_the_verdict_names_three_reasons_and_counts_the_rest(describe):
    verdict = describe([("a", "cat", None)], [finding("critical", 1200)] * 5).verdict
    assert verdict.count("1,200 files fail “A critical one”") == 3
    assert verdict.endswith("; 2 more critical expectations fail.")


def test_what_fails_stands_first(describe):
    overview = describe([("a", "cat", None)], [finding(mark) for mark in ("ok", "warning", "critical")])
    assert [one.mark for one in overview.findings] == ["critical", "warning", "ok"]


def test_sizes_name_the_smallest_and_the_largest(describe):
    overview = describe([("a", "x", None), ("b", "x", None), ("c", "x", None)], width=[10, 40, 30], height=[10, 10, 20])
    sizes = {name: (value, path) for name, value, path in overview.sizes}
    assert sizes["median size"] == ("30 × 10 px", "")
    assert sizes["smallest"] == ("10 × 10 px", "0000_a.png")
    assert sizes["largest"] == ("30 × 20 px", "0002_c.png")
    assert sizes["width to height"] == ("1.00 to 4.00, median 1.50", "")
    assert sizes["pixel format"] == ("RGB 3", "")
    deep = describe([("a", "x", None), ("b", "x", None)], mode=["I;16", "L"], bits=[12, None])
    assert ("pixel format", "I;16 1, L 1", "of 16-bit files, 12 bits hold values") in deep.sizes


def test_a_manifest_without_images_is_described_too(describe):
    overview = describe([], quarantine=[("a.png", "cat", "is empty")])
    assert (overview.num_contents, overview.sizes, overview.labels.rows, overview.samples.rows) == (0, [], [], [])
