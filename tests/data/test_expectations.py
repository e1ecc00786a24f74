import copy
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from loupe.data.expectations import (
    QUALITIES,
    Finding,
    Images,
    Limits,
    describe_images,
    list_worst,
    validate_images,
)
from loupe.data.manifest import check_masks

DECODES = "Every file decodes as one image (up to 10% may be set aside)"
SMALL = "Every image is at least 8 pixels wide and high"
LARGE = "Every image is at most 100 pixels wide and high"
LONG = "No image is more than 5 times as long as wide"
LABELLED = "Every image has a label: those without can be scored, but not trained on"
LABEL_KNOWN = "Every label of val and test is also a label of train"
FEW = "Every label that must be divided has at least 3 images"
ONE_LABEL = "Every content has one label"
MASK = "Every mask has its image's size and marks something"
PARTED = "Near-duplicates are not parted by the given splits"
FLAT = "No image is flat: its grey values deviate by at least 2"
FAR_OFF = [f"No image is far off the rest in {quality}" for quality in QUALITIES]
NO_LEAKS = pd.DataFrame({"first": [], "second": []}, dtype="str")


@pytest.fixture
def collect(read):
    """Reads a folder into what the suite looks at."""

    def collect(root, leaks=NO_LEAKS):
        manifest, quality, quarantine = read(root)
        return Images(manifest, quality, check_masks(root, manifest), quarantine, leaks)

    return collect


def limits(max_bad_fraction=0.1):
    return Limits(8, 100, max_aspect=5.0, min_contrast=2.0, min_images=3, max_bad_fraction=max_bad_fraction)


@pytest.fixture
def check(tmp_path, collect):
    """Runs the suite on a folder of images; findings by their sentence."""

    def check(root, max_bad_fraction=0.1, leaks=NO_LEAKS):
        findings, result = validate_images(
            describe_images(collect(root, leaks)), limits(max_bad_fraction), tmp_path / "docs"
        )
        critical = [finding.success for finding in findings if finding.severity == "critical"]
        assert result["success"] == all(finding.success for finding in findings)
        return {finding.sentence: finding for finding in findings}, all(critical)

    return check


@pytest.mark.parametrize("layout", ["class_folders", "split_folders", "mvtec"])
def test_good_images_meet_every_expectation(check, request, layout):
    findings, good = check(request.getfixturevalue(layout))
    assert good
    assert list(findings) == [
        DECODES,
        SMALL,
        LARGE,
        LONG,
        LABELLED,
        LABEL_KNOWN,
        FEW,
        ONE_LABEL,
        MASK,
        PARTED,
        FLAT,
        *FAR_OFF,
    ]
    assert all(finding.success and finding.num_failing == 0 and finding.files == [] for finding in findings.values())


def test_more_undecodable_files_than_allowed_fail_and_are_named(check, class_folders):
    (class_folders / "cat" / "0.png").write_bytes(b"")
    (class_folders / "dog" / "5.png").write_bytes(b"text")
    findings, good = check(class_folders)
    assert not good
    assert findings[DECODES].severity == "critical"
    assert findings[DECODES].num_failing == 2
    assert findings[DECODES].files == [
        "cat/0.png (can't be decoded: it is empty)",
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


def test_images_without_labels_fail_that_one_expectation(check, tmp_path, write):
    for seed in range(3):
        write(tmp_path / "photos" / f"{seed}.png", seed)
    findings, good = check(tmp_path / "photos")
    assert not good
    assert [sentence for sentence, finding in findings.items() if finding.num_failing] == [LABELLED]


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


def test_the_first_files_are_named_and_the_rest_counted(check, class_folders, write):
    for number in range(7):
        write(class_folders / "cat" / f"small{number}.png", 300 + number, size=(5, 5))
    finding = check(class_folders)[0][SMALL]
    assert finding.num_failing == 7
    assert [file.partition(" ")[0] for file in finding.files] == [f"cat/small{n}.png" for n in range(5)]
    assert finding.describe().startswith(f"{SMALL}: 7 of the files fail this: cat/small0.png")
    assert finding.describe().endswith("and 2 more")


def test_a_finding_without_hidden_files_says_nothing_of_more():
    finding = Finding(ONE_LABEL, "critical", False, 1, {"cat/0.png": "num labels of content: 2"})
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


def test_a_file_name_is_text_on_the_pages_for_people(check, class_folders, tmp_path):
    name = "<img src=x onerror=alert(1)> & more.png"
    (class_folders / "cat" / name).write_bytes(b"")
    findings, _ = check(class_folders)
    assert findings[DECODES].files[0].startswith(f"cat/{name} (")
    page = next((tmp_path / "docs" / "validations").rglob("*.html")).read_text()
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt; &amp; more.png" in page


def test_validating_does_not_change_its_tables(class_folders, collect, tmp_path):
    (class_folders / "cat" / "0.png").write_bytes(b"")
    images = collect(class_folders)
    before = copy.deepcopy(images)
    validate_images(describe_images(images), limits(), tmp_path / "docs")
    for name in ("manifest", "quality", "masks", "quarantine", "leaks"):
        pd.testing.assert_frame_equal(getattr(images, name), getattr(before, name))


def test_a_label_of_too_few_images_fails_and_its_files_are_named(check, class_folders, write):
    for number in range(2):
        write(class_folders / "cow" / f"{number}.png", 200 + number)
    findings, good = check(class_folders)
    assert not good
    assert findings[FEW].files == [f"cow/{number}.png (num images of label: 2)" for number in range(2)]


def test_copies_do_not_make_a_label_larger(check, class_folders, write):
    write(class_folders / "cow" / "0.png", 200)
    for number in range(1, 5):
        shutil.copyfile(class_folders / "cow" / "0.png", class_folders / "cow" / f"{number}.png")
    assert check(class_folders)[0][FEW].num_failing == 5


def test_a_label_of_the_given_test_alone_may_be_small(check, mvtec):
    assert check(mvtec)[0][FEW].success


@pytest.mark.parametrize("problem", ["size", "empty", "broken"])
def test_a_bad_mask_fails_and_its_image_is_named(check, mvtec, problem):
    path = mvtec / "ground_truth" / "scratch" / "1_mask.png"
    if problem == "broken":
        path.write_bytes(b"")
    else:
        Image.new("L", (24, 20) if problem == "empty" else (20, 24), 0).save(path)
    findings, good = check(mvtec)
    assert not good
    assert findings[MASK].num_failing == 1
    assert findings[MASK].files[0].startswith("test/scratch/1.png (mask problem: ")


def test_near_duplicates_that_the_given_splits_part_are_told_and_pass(check, split_folders):
    leaks = pd.DataFrame({"first": ["train/cat/0.png"], "second": ["test/cat/1.png"]})
    findings, good = check(split_folders, leaks=leaks)
    assert good
    assert findings[PARTED].severity == "warning"
    assert findings[PARTED].files == [
        "test/cat/1.png (near duplicate: train/cat/0.png)",
        "train/cat/0.png (near duplicate: test/cat/1.png)",
    ]


def test_a_file_with_several_near_duplicates_is_named_once(check, split_folders):
    leaks = pd.DataFrame({"first": ["train/cat/0.png"] * 2, "second": ["test/cat/1.png", "test/cat/0.png"]})
    assert check(split_folders, leaks=leaks)[0][PARTED].num_failing == 3


def test_a_flat_image_is_told_and_passes(check, class_folders):
    Image.new("L", (24, 20), 100).save(class_folders / "cat" / "flat.png")
    findings, good = check(class_folders)
    assert good
    assert findings[FLAT].files == ["cat/flat.png (contrast: 0)"]


def test_an_image_far_darker_than_the_rest_is_told_and_passes(check, class_folders):
    pixels = np.random.default_rng(0).integers(0, 12, (20, 24), dtype=np.uint8)
    Image.fromarray(pixels).save(class_folders / "cat" / "dark.png")
    findings, good = check(class_folders)
    assert good
    assert findings[FAR_OFF[0]].files[0].startswith("cat/dark.png (")
    assert findings[FAR_OFF[0]].files[0].endswith(" deviations below the median)")


def test_where_most_images_are_equally_bright_none_is_far_off(check, tmp_path):
    (tmp_path / "pets" / "cat").mkdir(parents=True)
    for number in range(5):
        image = Image.new("L", (24, 20), 100)
        image.putpixel((number, 0), 101)
        image.save(tmp_path / "pets" / "cat" / f"{number}.png")
    Image.new("L", (24, 20), 200).save(tmp_path / "pets" / "cat" / "bright.png")
    findings, _ = check(tmp_path / "pets")
    assert findings[FAR_OFF[0]].success


def test_the_worst_images_are_those_with_problems_first_and_say_which(class_folders, collect):
    Image.new("L", (24, 20), 100).save(class_folders / "cat" / "flat.png")
    shutil.copyfile(class_folders / "cat" / "2.png", class_folders / "dog" / "copy.png")
    worst = list_worst(describe_images(collect(class_folders)), limits(), 3).set_index("path")["reason"]
    assert set(worst.index) == {"cat/flat.png", "cat/2.png", "dog/copy.png"}
    assert worst["cat/flat.png"] == "flat"
    assert worst["dog/copy.png"] == "two labels"


def test_no_more_of_the_worst_images_are_listed_than_asked_for(class_folders, collect):
    for number in range(4):
        Image.new("L", (24, 20), 100 + number).save(class_folders / "cat" / f"flat{number}.png")
    assert len(list_worst(describe_images(collect(class_folders)), limits(), 2)) == 2


def test_files_that_do_not_decode_are_not_among_the_worst_images(class_folders, collect):
    (class_folders / "cat" / "bad.png").write_bytes(b"")
    assert "cat/bad.png" not in set(list_worst(describe_images(collect(class_folders)), limits(), 99)["path"])
