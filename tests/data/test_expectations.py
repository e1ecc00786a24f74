import shutil

import pandas as pd
import pytest
from PIL import Image

from loupe.data.expectations import Finding, Limits, validate_images
from loupe.data.manifest import build_manifest
from loupe.data.sources import list_images

DECODES = "Every file decodes as an image"
SMALL = "Every image is at least 8 pixels wide and high"
LARGE = "Every image is at most 100 pixels wide and high"
LONG = "No image is more than 5 times as long as wide"
MODE = "Every image has a known mode"
LABEL_KNOWN = "Every label of val and test is also a label of train"
ONE_LABEL = "Every content has one label"


@pytest.fixture
def check(tmp_path):
    """Runs the suite on a folder of images; findings by their sentence."""

    def check(root, max_bad_fraction=0.1):
        manifest, quarantine = build_manifest(root, list_images(root))
        limits = Limits(min_side=8, max_side=100, max_aspect=5.0, max_bad_fraction=max_bad_fraction)
        findings, result = validate_images(manifest, quarantine, limits, tmp_path / "docs")
        critical = [finding.success for finding in findings if finding.severity == "critical"]
        assert result["success"] == all(finding.success for finding in findings)
        return {finding.sentence: finding for finding in findings}, all(critical)

    return check


@pytest.mark.parametrize("layout", ["class_folders", "split_folders", "mvtec"])
def test_good_images_meet_every_expectation(check, request, layout):
    findings, good = check(request.getfixturevalue(layout))
    assert good
    assert list(findings) == [DECODES, SMALL, LARGE, LONG, MODE, LABEL_KNOWN, ONE_LABEL]
    assert all(finding.success and finding.num_failing == 0 and finding.files == [] for finding in findings.values())


def test_more_undecodable_files_than_allowed_fail_and_are_named(check, class_folders):
    (class_folders / "cat" / "0.png").write_bytes(b"")
    (class_folders / "dog" / "5.png").write_bytes(b"text")
    findings, good = check(class_folders)
    assert not good
    assert findings[DECODES].severity == "critical"
    assert findings[DECODES].num_failing == 2
    assert findings[DECODES].files == [
        "cat/0.png (can't be decoded: it is none of PNG, JPEG, BMP, WEBP, TIFF)",
        "dog/5.png (can't be decoded: it is none of PNG, JPEG, BMP, WEBP, TIFF)",
    ]


def test_undecodable_files_within_the_allowed_fraction_are_told_and_pass(check, class_folders):
    (class_folders / "cat" / "0.png").write_bytes(b"")
    findings, good = check(class_folders)
    assert good
    assert findings[DECODES].num_failing == 1


def test_exactly_the_allowed_fraction_passes(check, class_folders):
    for number in range(3):
        (class_folders / "cat" / f"{number}.png").write_bytes(b"")
    assert check(class_folders, max_bad_fraction=0.25)[1]


def test_a_folder_of_which_nothing_decodes_fails(check, class_folders):
    for path in class_folders.rglob("*.png"):
        path.write_bytes(b"")
    findings, good = check(class_folders)
    assert not good
    assert findings[DECODES].num_failing == 12


def test_one_content_in_two_labels_fails_and_both_files_are_named(check, class_folders):
    shutil.copyfile(class_folders / "cat" / "2.png", class_folders / "dog" / "copy.png")
    findings, good = check(class_folders)
    assert not good
    first, second = findings[ONE_LABEL].files
    assert first.startswith("cat/2.png (num labels of content: 2")
    assert second.startswith("dog/copy.png (num labels of content: 2")


def test_copies_within_one_label_pass(check, class_folders):
    shutil.copyfile(class_folders / "cat" / "2.png", class_folders / "cat" / "copy.png")
    assert check(class_folders)[1]


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_label_that_train_lacks_fails_and_its_files_are_named(check, split_folders, write, split):
    write(split_folders / split / "cow" / "0.png", 300)
    findings, good = check(split_folders)
    assert not good
    assert findings[LABEL_KNOWN].files == [f"{split}/cow/0.png (label is known: False)"]


def test_the_other_labels_of_a_one_class_train_set_are_anomalies_and_pass(check, mvtec):
    assert check(mvtec)[0][LABEL_KNOWN].success


def test_a_too_small_image_fails_and_is_named(check, class_folders, write):
    write(class_folders / "cat" / "small.png", 300, size=(20, 7))
    findings, good = check(class_folders)
    assert not good
    assert findings[SMALL].num_failing == 1
    assert findings[SMALL].files[0].startswith("cat/small.png (short side: 7")


def test_a_too_large_image_fails_and_is_named(check, class_folders, write):
    write(class_folders / "cat" / "large.png", 300, size=(101, 50))
    findings, good = check(class_folders)
    assert not good
    assert findings[LARGE].files[0].startswith("cat/large.png (long side: 101")


def test_an_elongated_image_is_told_and_passes(check, class_folders, write):
    write(class_folders / "cat" / "long.png", 300, size=(60, 10))
    findings, good = check(class_folders)
    assert good
    assert findings[LONG].severity == "warning"
    assert not findings[LONG].success
    assert findings[LONG].files[0].startswith("cat/long.png (aspect: 6")


def test_an_unknown_mode_fails_and_is_named(check, class_folders):
    Image.new("F", (20, 20), 0.5).save(class_folders / "cat" / "float.tiff")
    findings, good = check(class_folders)
    assert not good
    assert findings[MODE].files == ["cat/float.tiff (mode: F)"]


def test_the_first_files_are_named_and_the_rest_counted(check, class_folders, write):
    for number in range(7):
        write(class_folders / "cat" / f"small{number}.png", 300 + number, size=(5, 5))
    finding = check(class_folders)[0][SMALL]
    assert finding.num_failing == 7
    assert [file.partition(" ")[0] for file in finding.files] == [f"cat/small{n}.png" for n in range(5)]
    assert finding.describe().startswith(f"{SMALL}: 7 of the files fail this: cat/small0.png")
    assert finding.describe().endswith("and 2 more")


def test_a_finding_without_hidden_files_says_nothing_of_more():
    finding = Finding(ONE_LABEL, "critical", False, 1, ["cat/0.png (num labels of content: 2)"])
    assert finding.describe() == f"{ONE_LABEL}: 1 of the files fail this: cat/0.png (num labels of content: 2)"


def test_whole_numbers_are_told_as_such(check, class_folders, write):
    write(class_folders / "cat" / "small.png", 300, size=(20, 7))
    assert check(class_folders)[0][SMALL].files == ["cat/small.png (short side: 7)"]


def test_the_pages_for_people_tell_what_is_expected_and_which_files_fail(check, class_folders, tmp_path):
    (class_folders / "cat" / "0.png").write_bytes(b"")
    check(class_folders)
    assert (tmp_path / "docs" / "index.html").is_file()
    assert DECODES in (tmp_path / "docs" / "expectations" / "images.html").read_text()
    assert "cat/0.png" in next((tmp_path / "docs" / "validations").rglob("*.html")).read_text()


def test_validating_does_not_change_its_tables(class_folders, tmp_path):
    (class_folders / "cat" / "0.png").write_bytes(b"")
    manifest, quarantine = build_manifest(class_folders, list_images(class_folders))
    before = manifest.copy(), quarantine.copy()
    validate_images(manifest, quarantine, Limits(8, 100, 5.0, 0.1), tmp_path / "docs")
    pd.testing.assert_frame_equal(manifest, before[0])
    pd.testing.assert_frame_equal(quarantine, before[1])
