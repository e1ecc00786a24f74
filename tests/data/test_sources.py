import os
import shutil

import pandas as pd
import pytest

from loupe.data.sources import list_images, name_source
from loupe.errors import DataError


@pytest.mark.parametrize("layout", ["class_folders", "split_folders", "mvtec"])
def test_a_layout_is_recognised(layout, request):
    assert list_images(request.getfixturevalue(layout)).layout == layout


def test_class_folders_give_labels_and_no_splits(class_folders):
    rows = list_images(class_folders).rows
    assert rows["label"].value_counts().to_dict() == {"cat": 6, "dog": 6}
    assert rows["given_split"].isna().all()


def test_folders_within_a_class_folder_keep_its_label(class_folders, write):
    write(class_folders / "cat" / "monday" / "noon" / "0.png", 50)
    rows = list_images(class_folders).rows.set_index("path")
    assert rows.at["cat/monday/noon/0.png", "label"] == "cat"


def test_split_folders_give_labels_and_splits(split_folders):
    rows = list_images(split_folders).rows
    assert rows.groupby(["given_split", "label"]).size().to_dict() == {
        ("test", "cat"): 2,
        ("test", "dog"): 2,
        ("train", "cat"): 4,
        ("train", "dog"): 4,
        ("val", "cat"): 2,
        ("val", "dog"): 2,
    }


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_other_names_of_val_are_known(split_folders, name):
    (split_folders / "val").rename(split_folders / name)
    assert set(list_images(split_folders).rows["given_split"]) == {"train", "val", "test"}


def test_splits_may_be_written_in_capitals_and_in_other_forms(split_folders):
    shutil.rmtree(split_folders / "val")
    (split_folders / "train").rename(split_folders / "Training")
    (split_folders / "test").rename(split_folders / "Testing")
    listing = list_images(split_folders)
    assert listing.layout == "split_folders"
    assert listing.rows["given_split"].value_counts().to_dict() == {"train": 8, "test": 4}


def test_mvtec_gives_defects_as_labels(mvtec):
    rows = list_images(mvtec).rows
    assert rows.groupby(["given_split", "label"]).size().to_dict() == {
        ("test", "dent"): 2,
        ("test", "good"): 3,
        ("test", "scratch"): 3,
        ("train", "good"): 8,
    }


def test_mvtec_masks_are_found_beside_their_images(mvtec):
    rows = list_images(mvtec).rows
    masks = rows.dropna(subset="mask_path").set_index("path")["mask_path"].to_dict()
    assert masks == {f"test/scratch/{n}.png": f"ground_truth/scratch/{n}_mask.png" for n in range(3)}


def test_masks_of_normal_images_mark_nothing_and_are_passed_over(mvtec, write):
    expected = list_images(mvtec).rows
    write(mvtec / "ground_truth" / "good" / "0_mask.png", 70)
    pd.testing.assert_frame_equal(list_images(mvtec).rows, expected)


def test_a_mask_may_have_the_name_of_its_image(mvtec):
    folder = mvtec / "ground_truth" / "scratch"
    (folder / "0_mask.png").rename(folder / "0.png")
    rows = list_images(mvtec).rows.set_index("path")
    assert rows.at["test/scratch/0.png", "mask_path"] == "ground_truth/scratch/0.png"


@pytest.mark.parametrize("name", ["0_mask.bmp", "0.tif", "0_mask.PNG"])
def test_a_mask_may_be_of_any_format_that_is_read(mvtec, name):
    folder = mvtec / "ground_truth" / "scratch"
    (folder / "0_mask.png").rename(folder / name)
    rows = list_images(mvtec).rows.set_index("path")
    assert rows.at["test/scratch/0.png", "mask_path"] == f"ground_truth/scratch/{name}"


def test_the_masks_of_images_in_folders_of_a_defect_are_in_such_folders(mvtec, write):
    for part in ("a", "b"):
        write(mvtec / "test" / "hole" / part / "0.png", ord(part))
    write(mvtec / "ground_truth" / "hole" / "a" / "0_mask.png", 7)
    masks = list_images(mvtec).rows.set_index("path")["mask_path"]
    assert masks["test/hole/a/0.png"] == "ground_truth/hole/a/0_mask.png"
    assert masks.isna()["test/hole/b/0.png"]


def test_mvtec_without_masks_is_still_mvtec(mvtec):
    shutil.rmtree(mvtec / "ground_truth")
    listing = list_images(mvtec)
    assert listing.layout == "mvtec"
    assert listing.rows["mask_path"].isna().all()


def test_a_layout_that_is_asked_for_is_not_guessed(mvtec):
    listing = list_images(mvtec, "split_folders")
    assert listing.layout == "split_folders"
    assert listing.rows["mask_path"].isna().all()
    assert not listing.rows["path"].str.startswith("ground_truth").any()


def test_paths_are_relative_and_sorted(class_folders):
    paths = list(list_images(class_folders).rows["path"])
    assert paths == sorted(paths)
    assert all((class_folders / path).is_file() for path in paths)


def test_files_that_are_no_images_are_left_out(class_folders):
    (class_folders / "cat" / "notes.txt").write_text("not an image")
    (class_folders / "README.md").write_text("not a class")
    assert len(list_images(class_folders).rows) == 12


def test_hidden_files_and_folders_are_left_out(class_folders, write):
    write(class_folders / "cat" / ".thumb.png", 60)
    write(class_folders / ".cache" / "0.png", 61)
    assert len(list_images(class_folders).rows) == 12


def test_suffixes_in_capitals_count(class_folders):
    path = class_folders / "cat" / "0.png"
    path.rename(path.with_suffix(".PNG"))
    assert len(list_images(class_folders).rows) == 12


@pytest.mark.parametrize(
    ("paths", "found"),
    [
        (["train/cat/0.png", "test/cat/1.png", "extra/cat/2.png"], "the folders extra, test, train"),
        (["train/0.png", "test/1.png"], "the folders test, train"),
        (["test/cat/0.png"], "the folders test"),
    ],
)
def test_an_unknown_layout_is_answered_with_the_known_ones_and_what_was_found(tmp_path, write, paths, found):
    for seed, path in enumerate(paths):
        write(tmp_path / path, seed)
    with pytest.raises(DataError) as caught:
        list_images(tmp_path)
    message = str(caught.value)
    assert "has none of the known layouts. Expected class_folders: a folder for each class" in message
    assert message.endswith(f"Found {found}")


def test_images_in_no_folder_are_unlabelled(tmp_path, write):
    write(tmp_path / "0.png", 0)
    listing = list_images(tmp_path)
    assert listing.layout == "unlabelled"
    assert listing.rows["path"].tolist() == ["0.png"]
    assert listing.rows["label"].isna().all()


def test_any_folder_can_be_read_as_unlabelled(mvtec):
    listing = list_images(mvtec, "unlabelled")
    assert set(listing.rows["path"]) > set(list_images(mvtec, "mvtec").rows["path"])
    assert listing.rows["label"].isna().all()
    assert not listing.left_out


def test_images_beside_the_folders_of_classes_are_left_out_and_named(class_folders, write):
    write(class_folders / "overview.png", 60)
    listing = list_images(class_folders)
    assert listing.layout == "class_folders"
    assert len(listing.rows) == 12
    assert listing.left_out == ["overview.png"]


def test_pictures_of_other_kinds_are_rows_so_that_they_are_set_aside_and_named(class_folders):
    (class_folders / "dog" / "0.png").rename(class_folders / "dog" / "0.JFIF")
    (class_folders / "cow").mkdir()
    (class_folders / "cow" / "0.gif").write_bytes(b"GIF89a")
    rows = list_images(class_folders).rows
    assert {"cow/0.gif", "dog/0.JFIF"} <= set(rows["path"])


@pytest.mark.parametrize(("layout", "place"), [("class_folders", "cow"), ("split_folders", "valid")])
def test_a_link_in_the_place_of_a_class_or_a_split_is_refused_and_named(request, tmp_path, layout, place):
    root = request.getfixturevalue(layout)
    (tmp_path / "outside").mkdir()
    (root / place).symlink_to(tmp_path / "outside")
    with pytest.raises(DataError, match=f"^{place}: a link to a folder is not followed"):
        list_images(root)


def test_masks_are_not_left_out(mvtec):
    assert list_images(mvtec).left_out == []


def test_a_layout_that_the_folder_has_not_is_an_error(tmp_path, write):
    write(tmp_path / "0.png", 0)
    with pytest.raises(DataError, match="has no images in the layout class_folders"):
        list_images(tmp_path, "class_folders")


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(DataError, match="does not exist: expected a folder of images"):
        list_images(tmp_path / "missing")


def test_a_name_too_long_for_the_file_system_is_an_error(tmp_path):
    with pytest.raises(DataError):
        list_images(tmp_path / ("long" * 100))


def test_a_file_instead_of_a_folder_is_an_error(tmp_path, write):
    with pytest.raises(DataError, match="is a file: expected a folder of images"):
        list_images(write(tmp_path / "0.png", 0))


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"holds no images: expected files that end in \.png, "):
        list_images(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_an_unreadable_folder_is_an_error(class_folders):
    (class_folders / "cat").chmod(0)
    try:
        with pytest.raises(DataError, match=r"cat can't be read .*: make the folder readable"):
            list_images(class_folders)
    finally:
        (class_folders / "cat").chmod(0o700)


@pytest.fixture
def table(tmp_path, write):
    """Writes images 0.png to 3.png in a folder with a table of these columns beside them; returns the folder."""

    def table(suffix=".csv", **columns):
        root = tmp_path / "pets"
        for number in range(4):
            write(root / "images" / f"{number}.png", number)
        values = {"path": [f"images/{n}.png" for n in range(4)], "label": ["cat", "cat", "dog", "dog"], **columns}
        frame = pd.DataFrame({name: column for name, column in values.items() if column is not None})
        frame.to_csv(root / "list.csv", index=False) if suffix == ".csv" else frame.to_parquet(root / f"list{suffix}")
        return root

    return table


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_beside_the_images_is_recognised_and_read(table, suffix):
    listing = list_images(
        table(
            suffix,
            split=["train", "valid", "test", None],
            group=["a", "a", None, "b"],
            mask=[None, None, None, "images/0.png"],
        )
    )
    rows = listing.rows
    assert listing.layout == "table"
    assert rows["label"].tolist() == ["cat", "cat", "dog", "dog"]
    assert rows["given_split"].fillna("").tolist() == ["train", "val", "test", ""]
    assert rows["group"].fillna("").tolist() == ["a", "a", "", "b"]
    assert rows["mask_path"].fillna("").tolist() == ["", "", "", "images/0.png"]


def test_a_table_of_path_and_label_alone_gives_no_splits_groups_or_masks(table):
    assert list_images(table()).rows[["given_split", "group", "mask_path"]].isna().all(axis=None)


def test_a_table_counts_before_folders(table, write):
    root = table()
    write(root / "cow" / "0.png", 9)
    rows = list_images(root).rows
    assert len(rows) == 4
    assert "cow" not in set(rows["label"])


def test_a_table_of_other_things_is_passed_over(class_folders):
    (class_folders / "weather.csv").write_text("day,rain\n1,2\n")
    listing = list_images(class_folders)
    assert listing.layout == "class_folders"
    assert listing.left_out == ["weather.csv"]


def test_spaces_after_the_commas_of_a_table_do_not_count(class_folders):
    (class_folders / "list.csv").write_text("path, label\ncat/0.png, cow\n")
    rows = list_images(class_folders).rows
    assert rows[["path", "label"]].to_numpy().tolist() == [["cat/0.png", "cow"]]


@pytest.mark.parametrize(
    "content",
    [
        "path;label\ncat/0.png;a cow, standing\n",
        "Path\t Label \ncat/0.png\ta cow, standing  \n",
        '\ufeffpath,label\ncat/0.png,"a cow, standing",\n',
    ],
)
def test_a_table_is_read_as_spreadsheets_write_it(class_folders, content):
    (class_folders / "list.csv").write_text(content, encoding="utf-8")
    rows = list_images(class_folders).rows
    assert rows[["path", "label"]].to_numpy().tolist() == [["cat/0.png", "a cow, standing"]]


def test_of_two_tables_the_one_that_has_the_columns_is_taken(class_folders):
    (class_folders / "list.csv").write_text("path,label\ncat/0.png,cow\n")
    (class_folders / "notes.csv").write_text("day,rain\n1,2\n")
    assert list_images(class_folders).rows["label"].tolist() == ["cow"]


def test_two_columns_of_one_name_are_refused(class_folders):
    (class_folders / "list.csv").write_text("path,label,Label\ncat/0.png,cow,calf\n")
    with pytest.raises(DataError, match="more than one column 'label'"):
        list_images(class_folders, "table")


@pytest.mark.parametrize("content", ["", "a,b\n1,2,3,4\n", "\x00\x01"])
def test_a_broken_table_beside_class_folders_does_not_hide_them(class_folders, content):
    (class_folders / "notes.csv").write_text(content)
    assert list_images(class_folders).layout == "class_folders"


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, 0, 1, 1], ["0", "0", "1", "1"]),
        (["007", "007", "7", "7"], ["007", "007", "7", "7"]),
        (["None", "None", "NA", "NA"], ["None", "None", "NA", "NA"]),
        (["1.0", "1.0", "true", "true"], ["1.0", "1.0", "true", "true"]),
    ],
)
def test_labels_of_a_table_are_taken_as_they_are_written(table, labels, expected):
    assert list_images(table(label=labels)).rows["label"].tolist() == expected


def test_whole_numbers_as_groups_stay_whole_where_some_are_missing(table):
    assert list_images(table(group=["1", None, "1", "2"])).rows["group"].fillna("").tolist() == ["1", "", "1", "2"]


def test_a_file_that_a_table_lists_and_that_is_missing_is_set_aside(table, read):
    manifest, _, quarantine = read(table(path=["images/0.png", "images/1.png", "images/2.png", "images/gone.png"]))
    assert len(manifest) == 3
    assert quarantine.iloc[0].to_dict() == {"path": "images/gone.png", "label": "dog", "reason": "does not exist"}


@pytest.mark.parametrize("outside", ["../outside.png", "{tmp_path}/outside.png"])
def test_a_file_that_a_table_lists_outside_of_the_folder_is_set_aside(table, read, write, tmp_path, outside):
    write(tmp_path / "outside.png", 9)
    paths = ["images/0.png", "images/1.png", "images/2.png", outside.format(tmp_path=tmp_path)]
    manifest, _, quarantine = read(table(path=paths))
    assert len(manifest) == 3
    assert "outside" in quarantine["reason"].item() or "leaves" in quarantine["reason"].item()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"split": ["train", "train", "dev", "test"]}, "split must be one of train, val, .*, got 'dev'"),
        ({"label": ["cat", None, "dog", "dog"]}, "every row must have a path and a label"),
        ({"label": None}, r"must have the columns path and label; label is missing"),
    ],
)
def test_a_table_that_lacks_something_is_an_error_that_names_it(table, columns, message):
    with pytest.raises(DataError, match=message):
        list_images(table(**columns), "table")


def test_two_tables_beside_the_images_are_an_error(table):
    root = table()
    shutil.copyfile(root / "list.csv", root / "list2.csv")
    with pytest.raises(DataError, match=r"must hold one \.csv or \.parquet table beside its images, got 2"):
        list_images(root)


def test_a_table_that_can_not_be_read_is_an_error(table):
    root = table()
    (root / "list.csv").rename(root / "list.parquet")
    with pytest.raises(DataError, match=r"list\.parquet can't be read as a table"):
        list_images(root, "table")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("pets", "pets"),
        ("fashion_mnist/images", "fashion_mnist"),
        ("bolts/data/images", "bolts"),
        ("Pets and more!", "Pets_and_more"),
    ],
)
def test_a_source_is_named_after_the_folder_that_says_something(tmp_path, path, name):
    assert name_source(tmp_path / path) == name


def test_a_path_that_a_table_lists_twice_is_named(class_folders):
    (class_folders / "list.csv").write_text("path,label\ncat/0.png,cat\ncat/0.png,dog\n")
    with pytest.raises(DataError, match=r"one row an image, got cat/0\.png more than once"):
        list_images(class_folders)


def test_anomalous_images_to_train_on_are_refused_and_named(mvtec, write):
    write(mvtec / "train" / "scratch" / "7.png", 70)
    write(mvtec / "train" / "scratch" / "8.png", 71)
    with pytest.raises(DataError, match=r"normal images alone, in train/good/, got train/scratch/7.png and 1 more"):
        list_images(mvtec)


def test_a_mask_without_its_image_is_refused_and_named(mvtec):
    (mvtec / "test" / "scratch" / "1.png").unlink()
    with pytest.raises(DataError, match=r"masks without their images: ground_truth/scratch/1_mask.png;"):
        list_images(mvtec)
