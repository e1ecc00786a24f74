import hashlib
import json

import pandas as pd
import pytest
from hypothesis import given as draw_from
from hypothesis import settings
from hypothesis import strategies as st

from loupe.data.split import (
    Fractions,
    Tasks,
    assign_splits,
    compute_tasks,
    find_copies_across_splits,
    find_leaks,
    list_contents,
    load_tasks,
)
from loupe.errors import DataError

FRACTIONS = (0.1, 0.2, 0.3)  # val, calibration, test


@pytest.fixture
def free(tabulate):
    """Forty cats and twenty dogs, no split given."""
    return tabulate([(f"cat{n}", "cat", None) for n in range(40)] + [(f"dog{n}", "dog", None) for n in range(20)])


def given(label, **nums):
    """Triples of a label, so many images in each given split."""
    return [(f"{label} {split} {n}", label, split) for split, num in nums.items() for n in range(num)]


def counts(manifest, splits):
    return manifest.merge(splits, on="image_id").groupby(["label", "split"]).size().to_dict()


def test_every_content_is_in_one_split(free, divide):
    splits = divide(free, FRACTIONS, 0)
    assert list(splits.columns) == ["image_id", "split"]
    assert splits["image_id"].is_unique
    assert set(splits["image_id"]) == set(free["image_id"])


def test_splits_are_stratified_by_label(free, divide):
    assert counts(free, divide(free, FRACTIONS, 0)) == {
        ("cat", "calibration"): 8,
        ("cat", "test"): 12,
        ("cat", "train"): 16,
        ("cat", "val"): 4,
        ("dog", "calibration"): 4,
        ("dog", "test"): 6,
        ("dog", "train"): 8,
        ("dog", "val"): 2,
    }


def test_the_same_seed_gives_the_same_splits_whatever_the_order_of_rows(free, divide):
    shuffled = free.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(divide(free, FRACTIONS, 3), divide(shuffled, FRACTIONS, 3))


def test_another_seed_gives_other_splits(free, divide):
    assert not divide(free, FRACTIONS, 0).equals(divide(free, FRACTIONS, 1))


def test_splitting_does_not_change_its_manifest(free, divide):
    before = free.copy()
    divide(free, FRACTIONS, 0)
    pd.testing.assert_frame_equal(free, before)


def test_another_label_does_not_move_the_first(free, divide):
    cats = free[free["label"].eq("cat")]
    alone, together = divide(cats, FRACTIONS, 0), divide(free, FRACTIONS, 0)
    pd.testing.assert_frame_equal(alone, together[together["image_id"].isin(alone["image_id"])].reset_index(drop=True))


def test_given_splits_are_kept_and_only_the_missing_one_is_carved(tabulate, divide):
    manifest = tabulate(given("cat", train=20, val=5, test=7))
    splits = manifest.merge(divide(manifest, FRACTIONS, 0), on="image_id")
    assert (splits.loc[splits["given_split"].ne("train"), "split"] == splits["given_split"][20:]).all()
    assert splits["split"].value_counts().to_dict() == {"train": 16, "test": 7, "val": 5, "calibration": 4}


def test_val_and_calibration_are_carved_from_train_where_test_is_given(tabulate, divide):
    manifest = tabulate(given("cat", train=20, test=7))
    splits = divide(manifest, FRACTIONS, 0)
    assert splits["split"].value_counts().to_dict() == {"train": 14, "test": 7, "calibration": 4, "val": 2}


def test_a_given_val_without_a_test_becomes_the_test(tabulate, divide):
    manifest = tabulate(given("cat", train=20, val=5))
    splits = manifest.merge(divide(manifest, FRACTIONS, 0), on="image_id")
    assert set(splits.loc[splits["given_split"].eq("val"), "split"]) == {"test"}
    assert splits["split"].value_counts().to_dict() == {"train": 14, "test": 5, "calibration": 4, "val": 2}


@pytest.mark.parametrize("other", ["train", "val"])
def test_content_given_to_test_and_to_another_split_stays_in_test_only(tabulate, other, divide):
    triples = given("cat", train=20, val=5, test=5)
    copies = [(content, label, "test") for content, label, split in triples if split == other][:2]
    manifest = tabulate(triples + copies)
    splits = divide(manifest, FRACTIONS, 0).set_index("image_id")["split"]
    assert splits.index.is_unique
    assert set(splits[manifest["image_id"][-2:]]) == {"test"}


def test_content_given_to_train_and_val_stays_in_val(tabulate, divide):
    triples = given("cat", train=20, val=5, test=5)
    manifest = tabulate([*triples, ("cat train 0", "cat", "val")])
    splits = divide(manifest, FRACTIONS, 0).set_index("image_id")["split"]
    assert splits[manifest["image_id"].iloc[-1]] == "val"


def test_copies_within_a_label_are_one_content(tabulate, divide):
    manifest = tabulate([(f"cat{n % 10}", "cat", None) for n in range(30)])
    assert len(divide(manifest, FRACTIONS, 0)) == 10


def test_a_label_of_test_alone_stays_there(tabulate, divide):
    manifest = tabulate(given("good", train=20, test=3) + given("scratch", test=2))
    assert counts(manifest, divide(manifest, FRACTIONS, 0))["scratch", "test"] == 2


def test_every_carved_split_gets_at_least_one_image(tabulate, divide):
    manifest = tabulate([(f"cat{n}", "cat", None) for n in range(4)])
    splits = divide(manifest, (0.01, 0.01, 0.01), 0)
    assert sorted(splits["split"]) == ["calibration", "test", "train", "val"]


@pytest.mark.parametrize("num_images", [1, 2, 3])
def test_a_label_with_too_few_images_is_named(tabulate, num_images, divide):
    cats = [(f"cat{n}", "cat", None) for n in range(20)]
    manifest = tabulate(cats + [(f"dog{n}", "dog", None) for n in range(num_images)])
    with pytest.raises(DataError, match=rf"class 'dog' has {num_images} images, too few .*: expected at least 4"):
        divide(manifest, FRACTIONS, 0)


def test_fractions_that_leave_a_small_label_nothing_to_train_on_are_an_error(tabulate, divide):
    manifest = tabulate([(f"cat{n}", "cat", None) for n in range(4)])
    with pytest.raises(DataError, match="class 'cat' has 4 images, too few"):
        divide(manifest, (0.2, 0.2, 0.55), 0)


def test_images_that_are_all_given_to_test_are_an_error(tabulate, divide):
    manifest = tabulate(given("cat", test=5) + given("dog", test=5))
    with pytest.raises(DataError):
        compute_tasks(manifest, divide(manifest, FRACTIONS, 0), ["good"])


def test_contents_in_two_given_splits_are_found_with_their_paths(tabulate):
    manifest = tabulate([*given("cat", train=3, test=2), ("cat train 1", "cat", "test")])
    leaks = find_copies_across_splits(manifest)
    assert leaks["image_id"].item() == manifest["image_id"][1]
    assert leaks["path"].item() == "0001_cat train 1.png, 0005_cat train 1.png"


def test_copies_within_one_split_are_no_leak(tabulate, free):
    assert find_copies_across_splits(tabulate([*given("cat", train=3, test=2), ("cat train 1", "cat", "train")])).empty
    assert find_copies_across_splits(free).empty


@pytest.fixture
def tasks_of(divide):
    """What a manifest allows to train, once it is divided."""
    return lambda manifest, normal_labels: compute_tasks(manifest, divide(manifest, FRACTIONS, 0), normal_labels)


def test_two_classes_with_a_normal_one_allow_both_models(free, tasks_of):
    tasks = tasks_of(free, ["good", "dog"])
    assert tasks == Tasks(["cat", "dog"], "dog", None, None)


def test_tasks_survive_a_file(free, tmp_path, tasks_of):
    tasks = tasks_of(free, ["fine"])
    (tmp_path / "tasks.json").write_text(json.dumps(tasks.to_json()))
    assert load_tasks(tmp_path / "tasks.json") == tasks


def test_the_first_normal_label_that_occurs_is_taken(free, tasks_of):
    assert tasks_of(free, ["good", "dog", "cat"]).normal_label == "dog"


def test_one_class_allows_a_detector_alone(tabulate, tasks_of):
    manifest = tabulate(given("good", train=20, test=3) + given("scratch", test=2))
    tasks = tasks_of(manifest, ["good"])
    assert (tasks.labels, tasks.normal_label) == ([], "good")
    assert tasks.no_classifier_because == "there is one class to train on (good)"
    assert tasks.no_detector_because is None


def test_no_normal_class_allows_a_classifier_alone(free, tasks_of):
    tasks = tasks_of(free, ["good", "fine"])
    assert (tasks.labels, tasks.normal_label) == (["cat", "dog"], None)
    assert tasks.no_detector_because == "none of split.normal_labels (good, fine) is among the training classes"


def test_a_normal_label_of_test_alone_is_not_among_the_training_classes(tabulate, tasks_of):
    manifest = tabulate(given("cat", train=20, test=3) + given("dog", train=20, test=3) + given("good", test=2))
    assert tasks_of(manifest, ["good"]).normal_label is None


def test_without_an_anomalous_test_image_there_is_no_detector(tabulate, tasks_of):
    tasks = tasks_of(tabulate(given("good", train=20, test=3)), ["good"])
    assert tasks.normal_label is None
    assert tasks.no_detector_because == "the test images are all 'good': none is anomalous"
    assert tasks.no_classifier_because is not None


def test_without_a_normal_test_image_there_is_no_detector(tabulate, tasks_of):
    tasks = tasks_of(tabulate(given("good", train=20) + given("hole", test=3)), ["good"])
    assert tasks.normal_label is None
    assert tasks.no_detector_because == "no test image is 'good': false alarms could not be counted"


def test_without_a_normal_image_of_val_there_is_no_detector(tabulate, tasks_of):
    manifest = tabulate(given("good", train=20, test=3) + given("hole", val=2, test=2))
    tasks = tasks_of(manifest, ["good"])
    assert tasks.normal_label is None
    assert tasks.no_detector_because == "no image of val is 'good': a fit could not be watched"


def test_a_label_of_test_alone_is_no_class_of_the_classifier(tabulate, tasks_of):
    manifest = tabulate(given("cat", train=20, test=3) + given("dog", train=20, test=3) + given("cow", test=2))
    assert tasks_of(manifest, []).labels == ["cat", "dog"]


def test_a_label_whose_train_images_are_all_in_test_too_is_named(tabulate, tasks_of):
    copies = [("cow 0", "cow", "train"), ("cow 0", "cow", "test")]
    manifest = tabulate(given("cat", train=20, test=3) + given("dog", train=20, test=3) + copies)
    with pytest.raises(DataError, match="no image of 'cow' is left to train on"):
        tasks_of(manifest, [])


def test_too_few_images_after_some_were_removed_say_how_to_divide_anew(tabulate, divide):
    manifest = tabulate([(f"cat{n}", "cat", None) for n in range(9)])
    splits = divide(manifest, FRACTIONS, 0)
    gone = splits["image_id"][splits["split"].eq("val")]
    contents = list_contents(manifest[~manifest["image_id"].isin(gone)]).assign(cluster=range(9 - len(gone)))
    with pytest.raises(DataError, match="or remove data/split"):
        assign_splits(contents, Fractions(0.1, 0.1, 0.2), 0, splits)


@pytest.mark.parametrize(("layout", "given_splits"), [("split_folders", {"train", "val", "test"}), ("mvtec", {"test"})])
def test_a_folder_on_disk_keeps_its_splits(request, read, layout, given_splits, divide):
    root = request.getfixturevalue(layout)
    manifest = read(root)[0]
    rows = manifest.merge(divide(manifest, (0.2, 0.2, 0.2), 0), on="image_id")
    assert set(rows["split"]) == {"train", "val", "calibration", "test"}
    held_out = rows[rows["given_split"].isin(given_splits - {"train"})]
    assert (held_out["split"] == held_out["given_split"]).all()


def manifest_of(*rows):
    """Rows of (content, label, group, given split, path)."""
    table = pd.DataFrame(rows, columns=["image_id", "label", "group", "given_split", "path"], dtype="str")
    return table.astype("str")


def test_contents_are_listed_once_sorted_by_their_id():
    manifest = manifest_of(("b", "cat", None, None, "0"), ("a", "dog", "g", None, "1"), ("b", "cat", None, None, "2"))
    contents = list_contents(manifest)
    assert list(contents.columns) == ["image_id", "label", "group", "given_split"]
    assert contents["image_id"].tolist() == ["a", "b"]


def test_the_group_of_a_content_is_kept_where_one_of_its_copies_has_none():
    manifest = manifest_of(("a", "cat", None, None, "0"), ("a", "cat", "g", None, "1"))
    assert list_contents(manifest)["group"].tolist() == ["g"]


def contents_of(clusters, labels=None, given_splits=None, names=None):
    """One content a cluster number; ids are digests, as they are of files."""
    names = names or [f"{number}" for number in range(len(clusters))]
    return pd.DataFrame(
        {
            "image_id": [hashlib.sha256(name.encode()).hexdigest() for name in names],
            "label": labels or ["cat"] * len(clusters),
            "group": pd.Series([None] * len(clusters), dtype="str"),
            "given_split": pd.Series(given_splits or [None] * len(clusters), dtype="str"),
            "cluster": clusters,
        }
    )


def test_a_new_image_that_bridges_two_splits_is_left_out():
    old = contents_of(list(range(40)))
    previous = assign_splits(old, Fractions(*FRACTIONS), 0)
    splits = previous.set_index("image_id")["split"][old["image_id"]].tolist()
    in_train, in_test = splits.index("train"), splits.index("test")
    clusters = [in_train if number == in_test else number for number in range(40)]
    again = assign_splits(contents_of([*clusters, in_train, 99]), Fractions(*FRACTIONS), 0, previous)
    bridge, unrelated = contents_of(list(range(42)))["image_id"][40:]
    assert bridge not in set(again["image_id"])
    assert unrelated in set(again["image_id"])
    assert len(again) == 41


def test_a_new_image_joins_the_split_of_those_it_looks_like():
    old = contents_of(list(range(40)))
    previous = assign_splits(old, Fractions(*FRACTIONS), 0)
    again = assign_splits(contents_of([*range(40), *range(40)]), Fractions(*FRACTIONS), 0, previous)
    split_of = again.set_index("image_id")["split"]
    ids = contents_of([0] * 80)["image_id"]
    assert split_of[ids[:40]].tolist() == split_of[ids[40:]].tolist()


def test_previous_splits_that_a_folder_now_gives_otherwise_do_not_count():
    old = contents_of(list(range(40)))
    previous = assign_splits(old, Fractions(*FRACTIONS), 0)
    given_now = contents_of(list(range(40)), given_splits=["train"] * 30 + ["test"] * 10)
    again = given_now.merge(assign_splits(given_now, Fractions(*FRACTIONS), 0, previous), on="image_id")
    assert (again["split"].eq("test") == again["given_split"].eq("test")).all()


def test_a_cluster_much_larger_than_every_quota_is_trained_on():
    splits = assign_splits(contents_of([0] * 40 + list(range(1, 41))), Fractions(*FRACTIONS), 0)
    assert set(splits.set_index("image_id")["split"][contents_of([0] * 40)["image_id"]]) == {"train"}


def test_a_label_of_one_very_large_cluster_and_enough_others_is_divided():
    splits = assign_splits(contents_of([0] * 30 + list(range(1, 21))), Fractions(*FRACTIONS), 0)
    assert set(splits["split"]) == {"train", "val", "calibration", "test"}


@pytest.mark.parametrize(("num_clusters", "size"), [(4, 20), (5, 20), (6, 20), (5, 2)])
def test_few_clusters_of_one_size_are_one_each_to_what_is_held_out_and_the_rest_to_train(num_clusters, size):
    contents = contents_of([number for number in range(num_clusters) for _ in range(size)])
    rows = contents.merge(assign_splits(contents, Fractions(*FRACTIONS), 0), on="image_id")
    assert rows.groupby("cluster")["split"].nunique().eq(1).all()
    clusters = rows.groupby("split")["cluster"].nunique()
    assert clusters.to_dict() == {"train": num_clusters - 3, "val": 1, "calibration": 1, "test": 1}


def test_an_image_without_a_split_joins_what_is_held_out_of_its_cluster():
    clusters = [*range(40), 0, 1, 2]
    given_splits = ["test", "val", "train", *[None] * 37, None, None, "test"]
    contents = contents_of(clusters, given_splits=given_splits)
    rows = contents.merge(assign_splits(contents, Fractions(*FRACTIONS), 0), on="image_id")
    split_of = rows.set_index("image_id")["split"][contents["image_id"]].tolist()
    assert split_of[40:] == ["test", "val", "test"]
    assert split_of[2] != "test"  # as it is given, so it stays


def test_an_image_like_two_that_are_held_out_apart_is_left_out():
    contents = contents_of([*range(40), 0, 0], given_splits=["test", *[None] * 39, "val", None])
    splits = assign_splits(contents, Fractions(*FRACTIONS), 0)
    assert len(splits) == 41
    assert contents["image_id"].iloc[-1] not in set(splits["image_id"])


def test_a_label_of_too_few_clusters_says_how_many_there_are():
    with pytest.raises(DataError, match="class 'cat' has 30 images in 2 groups of like ones, too few"):
        assign_splits(contents_of([0] * 15 + [1] * 15), Fractions(*FRACTIONS), 0)


def test_near_duplicates_in_two_splits_are_leaks():
    contents = contents_of([0, 1, 2]).assign(image_id=list("abc"), split=["train", "test", "train"])
    pairs = pd.DataFrame({"first": ["a", "a"], "second": ["b", "c"]})
    assert find_leaks(contents, pairs, "split").to_dict("records") == [
        {"first": "a", "second": "b", "first_split": "train", "second_split": "test"}
    ]


def test_members_of_a_group_in_two_splits_are_leaks():
    contents = contents_of([0, 1, 2]).assign(
        image_id=list("abc"), split=["train", "train", "test"], group=pd.Series(["g", "h", "g"], dtype="str")
    )
    leaks = find_leaks(contents, pd.DataFrame({"first": [], "second": []}, dtype="str"), "split")
    assert (leaks["first"].tolist(), leaks["second"].tolist()) == (["a"], ["c"])


def test_images_without_a_split_are_no_leaks():
    contents = contents_of([0, 1]).assign(image_id=list("ab"), given_split=pd.Series(["train", None], dtype="str"))
    assert find_leaks(contents, pd.DataFrame({"first": ["a"], "second": ["b"]}), "given_split").empty


fractions = st.tuples(*[st.sampled_from([0.05, 0.1, 0.15, 0.2])] * 3).map(lambda values: Fractions(*values))
seeds = st.integers(0, 2**32 - 1)


@st.composite
def datasets(draw, max_size=4):
    """Contents of one to three labels, in clusters of one to `max_size` images of which some cross labels."""
    clusters, labels = [], []
    for label in draw(st.sampled_from(["a", "ab", "abc"])):
        sizes = draw(st.lists(st.integers(1, max_size), min_size=30, max_size=50))
        for number, size in enumerate(sizes):
            crosses = max_size > 1 and number < 2
            clusters += [number if crosses else (ord(label) * 1000 + number)] * size
            labels += [label] * size
    return contents_of(clusters, labels)


def properties(max_examples=15):
    return settings(max_examples=max_examples, deadline=None, derandomize=True, database=None)


@properties()
@draw_from(contents=datasets(), fractions=fractions, seed=seeds)
def test_whatever_the_clusters_every_content_is_in_one_split_and_every_split_has_some(contents, fractions, seed):
    splits = assign_splits(contents, fractions, seed)
    assert splits["image_id"].tolist() == sorted(contents["image_id"])
    assert set(splits["split"]) == {"train", "val", "calibration", "test"}


@properties()
@draw_from(contents=datasets(), fractions=fractions, seed=seeds)
def test_whatever_the_seed_clusters_stay_whole(contents, fractions, seed):
    rows = contents.merge(assign_splits(contents, fractions, seed), on="image_id")
    assert rows.drop_duplicates(["cluster", "split"])["cluster"].is_unique


@properties()
@draw_from(contents=datasets(), fractions=fractions, seed=seeds)
def test_whatever_the_seed_no_pair_and_no_group_leaks(contents, fractions, seed):
    groups = pd.Series([f"g{cluster}" for cluster in contents["cluster"]], dtype="str")
    contents = contents.assign(group=groups.where(contents.index % 2 == 0))
    firsts = contents.groupby("cluster")["image_id"].transform("first")
    pairs = pd.DataFrame({"first": firsts, "second": contents["image_id"]})
    rows = contents.merge(assign_splits(contents, fractions, seed), on="image_id")
    assert find_leaks(rows, pairs, "split").empty


@properties()
@draw_from(contents=datasets(max_size=1), fractions=fractions, seed=seeds)
def test_single_images_are_stratified_within_one_image_of_the_quota(contents, fractions, seed):
    rows = contents.merge(assign_splits(contents, fractions, seed), on="image_id")
    for _, of_label in rows.groupby("label"):
        for split in ("val", "calibration", "test"):
            quota = getattr(fractions, split) * len(of_label)
            assert abs(of_label["split"].eq(split).sum() - quota) <= 1


@properties()
@draw_from(contents=datasets(), fractions=fractions, seed=seeds, order=st.randoms(use_true_random=False))
def test_splits_do_not_follow_the_order_of_rows_nor_the_numbers_of_clusters(contents, fractions, seed, order):
    rows = list(range(len(contents)))
    order.shuffle(rows)
    shuffled = contents.iloc[rows].assign(cluster=lambda table: table["cluster"].max() - table["cluster"])
    pd.testing.assert_frame_equal(assign_splits(contents, fractions, seed), assign_splits(shuffled, fractions, seed))


@properties()
@draw_from(contents=datasets(), fractions=fractions, seed=seeds, data=st.data())
def test_no_old_image_moves_when_images_are_added(contents, fractions, seed, data):
    previous = assign_splits(contents, fractions, seed)
    known = contents["cluster"].unique().tolist()
    new = data.draw(st.lists(st.one_of(st.sampled_from(known), st.integers(10**6, 10**6 + 9)), min_size=1, max_size=40))
    names = [f"new{number}" for number in range(len(new))]
    added = pd.concat([contents, contents_of(new, names=names).assign(label="a")], ignore_index=True)
    again = assign_splits(added, fractions, seed, previous)
    pd.testing.assert_frame_equal(again[again["image_id"].isin(previous["image_id"])].reset_index(drop=True), previous)
    rows = added.merge(again, on="image_id")
    assert len(rows) == len(added)
    assert rows.drop_duplicates(["cluster", "split"])["cluster"].is_unique


@properties()
@draw_from(contents=datasets(), fractions=fractions, seed=seeds, data=st.data())
def test_what_was_joined_later_is_left_out_and_nothing_old_moves(contents, fractions, seed, data):
    """New images tie clusters together: those over two splits are left out, the others join."""
    previous = assign_splits(contents, fractions, seed)
    split_of = contents.merge(previous, on="image_id").groupby("cluster")["split"].first()
    first, second = data.draw(st.lists(st.sampled_from(sorted(split_of.index)), min_size=2, max_size=2, unique=True))
    new = contents_of([first], names=["new"]).assign(label="a")
    merged = pd.concat([contents, new], ignore_index=True)
    merged["cluster"] = merged["cluster"].replace(second, first)
    again = assign_splits(merged, fractions, seed, previous)
    is_bridge = split_of[first] != split_of[second]
    assert (new["image_id"].item() in set(again["image_id"])) is not is_bridge
    pd.testing.assert_frame_equal(again[again["image_id"].isin(previous["image_id"])].reset_index(drop=True), previous)


@properties()
@draw_from(contents=datasets(), fractions=fractions, seed=seeds, held_out=st.sampled_from([("test",), ("val", "test")]))
def test_a_given_split_is_kept_whatever_the_clusters(contents, fractions, seed, held_out):
    given_splits = pd.Series("train", contents.index)
    for place, split in enumerate(held_out):
        given_splits[contents.index % 7 == place] = split
    contents = contents.assign(given_split=given_splits)
    rows = contents.merge(assign_splits(contents, fractions, seed), on="image_id")
    kept = rows[rows["given_split"].ne("train")]
    assert (kept["split"] == kept["given_split"]).all()
    assert not rows.loc[rows["given_split"].eq("train"), "split"].isin(held_out).any()
