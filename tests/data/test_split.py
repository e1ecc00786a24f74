import json

import pandas as pd
import pytest

from loupe.data.manifest import build_manifest
from loupe.data.sources import list_images
from loupe.data.split import Fractions, Tasks, assign_splits, compute_tasks, find_leaks, load_tasks
from loupe.errors import DataError

FRACTIONS = Fractions(val=0.1, calibration=0.2, test=0.3)


@pytest.fixture
def free(tabulate):
    """Forty cats and twenty dogs, no split given."""
    return tabulate([(f"cat{n}", "cat", None) for n in range(40)] + [(f"dog{n}", "dog", None) for n in range(20)])


def given(label, **nums):
    """Triples of a label, so many images in each given split."""
    return [(f"{label} {split} {n}", label, split) for split, num in nums.items() for n in range(num)]


def counts(manifest, splits):
    return manifest.merge(splits, on="image_id").groupby(["label", "split"]).size().to_dict()


def test_every_content_is_in_one_split(free):
    splits = assign_splits(free, FRACTIONS, 0)
    assert list(splits.columns) == ["image_id", "split"]
    assert splits["image_id"].is_unique
    assert set(splits["image_id"]) == set(free["image_id"])


def test_splits_are_stratified_by_label(free):
    assert counts(free, assign_splits(free, FRACTIONS, 0)) == {
        ("cat", "calibration"): 8,
        ("cat", "test"): 12,
        ("cat", "train"): 16,
        ("cat", "val"): 4,
        ("dog", "calibration"): 4,
        ("dog", "test"): 6,
        ("dog", "train"): 8,
        ("dog", "val"): 2,
    }


def test_the_same_seed_gives_the_same_splits_whatever_the_order_of_rows(free):
    shuffled = free.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(assign_splits(free, FRACTIONS, 3), assign_splits(shuffled, FRACTIONS, 3))


def test_another_seed_gives_other_splits(free):
    assert not assign_splits(free, FRACTIONS, 0).equals(assign_splits(free, FRACTIONS, 1))


def test_splitting_does_not_change_its_manifest(free):
    before = free.copy()
    assign_splits(free, FRACTIONS, 0)
    pd.testing.assert_frame_equal(free, before)


def test_another_label_does_not_move_the_first(free):
    cats = free[free["label"].eq("cat")]
    alone, together = assign_splits(cats, FRACTIONS, 0), assign_splits(free, FRACTIONS, 0)
    pd.testing.assert_frame_equal(alone, together[together["image_id"].isin(alone["image_id"])].reset_index(drop=True))


def test_given_splits_are_kept_and_only_the_missing_one_is_carved(tabulate):
    manifest = tabulate(given("cat", train=20, val=5, test=7))
    splits = manifest.merge(assign_splits(manifest, FRACTIONS, 0), on="image_id")
    assert (splits.loc[splits["given_split"].ne("train"), "split"] == splits["given_split"][20:]).all()
    assert splits["split"].value_counts().to_dict() == {"train": 16, "test": 7, "val": 5, "calibration": 4}


def test_val_and_calibration_are_carved_from_train_where_test_is_given(tabulate):
    manifest = tabulate(given("cat", train=20, test=7))
    splits = assign_splits(manifest, FRACTIONS, 0)
    assert splits["split"].value_counts().to_dict() == {"train": 14, "test": 7, "calibration": 4, "val": 2}


def test_a_given_val_without_a_test_becomes_the_test(tabulate):
    manifest = tabulate(given("cat", train=20, val=5))
    splits = manifest.merge(assign_splits(manifest, FRACTIONS, 0), on="image_id")
    assert set(splits.loc[splits["given_split"].eq("val"), "split"]) == {"test"}
    assert splits["split"].value_counts().to_dict() == {"train": 14, "test": 5, "calibration": 4, "val": 2}


@pytest.mark.parametrize("other", ["train", "val"])
def test_content_given_to_test_and_to_another_split_stays_in_test_only(tabulate, other):
    triples = given("cat", train=20, val=5, test=5)
    copies = [(content, label, "test") for content, label, split in triples if split == other][:2]
    manifest = tabulate(triples + copies)
    splits = assign_splits(manifest, FRACTIONS, 0).set_index("image_id")["split"]
    assert splits.index.is_unique
    assert set(splits[manifest["image_id"][-2:]]) == {"test"}


def test_content_given_to_train_and_val_stays_in_val(tabulate):
    triples = given("cat", train=20, val=5, test=5)
    manifest = tabulate([*triples, ("cat train 0", "cat", "val")])
    splits = assign_splits(manifest, FRACTIONS, 0).set_index("image_id")["split"]
    assert splits[manifest["image_id"].iloc[-1]] == "val"


def test_copies_within_a_label_are_one_content(tabulate):
    manifest = tabulate([(f"cat{n % 10}", "cat", None) for n in range(30)])
    assert len(assign_splits(manifest, FRACTIONS, 0)) == 10


def test_a_label_of_test_alone_stays_there(tabulate):
    manifest = tabulate(given("good", train=20, test=3) + given("scratch", test=2))
    assert counts(manifest, assign_splits(manifest, FRACTIONS, 0))["scratch", "test"] == 2


def test_every_carved_split_gets_at_least_one_image(tabulate):
    manifest = tabulate([(f"cat{n}", "cat", None) for n in range(4)])
    splits = assign_splits(manifest, Fractions(0.01, 0.01, 0.01), 0)
    assert sorted(splits["split"]) == ["calibration", "test", "train", "val"]


@pytest.mark.parametrize("num_images", [1, 2, 3])
def test_a_label_with_too_few_images_is_named(tabulate, num_images):
    cats = [(f"cat{n}", "cat", None) for n in range(20)]
    manifest = tabulate(cats + [(f"dog{n}", "dog", None) for n in range(num_images)])
    with pytest.raises(DataError, match=rf"class 'dog' has {num_images} images, too few .*: expected at least 4"):
        assign_splits(manifest, FRACTIONS, 0)


def test_fractions_that_leave_a_small_label_nothing_to_train_on_are_an_error(tabulate):
    manifest = tabulate([(f"cat{n}", "cat", None) for n in range(4)])
    with pytest.raises(DataError, match="class 'cat' has 4 images, too few"):
        assign_splits(manifest, Fractions(0.2, 0.2, 0.55), 0)


def test_images_that_are_all_given_to_test_are_an_error(tabulate):
    manifest = tabulate(given("cat", test=5) + given("dog", test=5))
    with pytest.raises(DataError):
        compute_tasks(manifest, assign_splits(manifest, FRACTIONS, 0), ["good"])


def test_contents_in_two_given_splits_are_found_with_their_paths(tabulate):
    manifest = tabulate([*given("cat", train=3, test=2), ("cat train 1", "cat", "test")])
    leaks = find_leaks(manifest)
    assert leaks["image_id"].item() == manifest["image_id"][1]
    assert leaks["path"].item() == "0001_cat train 1.png, 0005_cat train 1.png"


def test_copies_within_one_split_are_no_leak(tabulate, free):
    assert find_leaks(tabulate([*given("cat", train=3, test=2), ("cat train 1", "cat", "train")])).empty
    assert find_leaks(free).empty


def tasks_of(manifest, normal_labels):
    return compute_tasks(manifest, assign_splits(manifest, FRACTIONS, 0), normal_labels)


def test_two_classes_with_a_normal_one_allow_both_models(free):
    tasks = tasks_of(free, ["good", "dog"])
    assert tasks == Tasks(["cat", "dog"], "dog", None, None)


def test_tasks_survive_a_file(free, tmp_path):
    tasks = tasks_of(free, ["fine"])
    (tmp_path / "tasks.json").write_text(json.dumps(tasks.to_json()))
    assert load_tasks(tmp_path / "tasks.json") == tasks


def test_the_first_normal_label_that_occurs_is_taken(free):
    assert tasks_of(free, ["good", "dog", "cat"]).normal_label == "dog"


def test_one_class_allows_a_detector_alone(tabulate):
    manifest = tabulate(given("good", train=20, test=3) + given("scratch", test=2))
    tasks = tasks_of(manifest, ["good"])
    assert (tasks.labels, tasks.normal_label) == ([], "good")
    assert tasks.no_classifier_because == "there is one class to train on (good)"
    assert tasks.no_detector_because is None


def test_no_normal_class_allows_a_classifier_alone(free):
    tasks = tasks_of(free, ["good", "fine"])
    assert (tasks.labels, tasks.normal_label) == (["cat", "dog"], None)
    assert tasks.no_detector_because == "none of split.normal_labels (good, fine) is among the training classes"


def test_a_normal_label_of_test_alone_is_not_among_the_training_classes(tabulate):
    manifest = tabulate(given("cat", train=20, test=3) + given("dog", train=20, test=3) + given("good", test=2))
    assert tasks_of(manifest, ["good"]).normal_label is None


def test_without_an_anomalous_test_image_there_is_no_detector(tabulate):
    tasks = tasks_of(tabulate(given("good", train=20, test=3)), ["good"])
    assert tasks.normal_label is None
    assert tasks.no_detector_because == "the test images are all 'good': none is anomalous"
    assert tasks.no_classifier_because is not None


def test_a_label_of_test_alone_is_no_class_of_the_classifier(tabulate):
    manifest = tabulate(given("cat", train=20, test=3) + given("dog", train=20, test=3) + given("cow", test=2))
    assert tasks_of(manifest, []).labels == ["cat", "dog"]


@pytest.mark.parametrize(("layout", "given_splits"), [("split_folders", {"train", "val", "test"}), ("mvtec", {"test"})])
def test_a_folder_on_disk_keeps_its_splits(request, layout, given_splits):
    root = request.getfixturevalue(layout)
    manifest, _ = build_manifest(root, list_images(root))
    rows = manifest.merge(assign_splits(manifest, Fractions(0.2, 0.2, 0.2), 0), on="image_id")
    assert set(rows["split"]) == {"train", "val", "calibration", "test"}
    held_out = rows[rows["given_split"].isin(given_splits - {"train"})]
    assert (held_out["split"] == held_out["given_split"]).all()
