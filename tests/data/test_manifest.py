import hashlib
import shutil

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

from loupe.data.manifest import (
    QUARANTINE_SCHEMA,
    SCHEMA,
    build_manifest,
    compute_data_digest,
    load_table,
    save_table,
)
from loupe.data.sources import list_images
from loupe.errors import DataError


def read(root):
    return build_manifest(root, list_images(root))


def test_there_is_one_row_an_image_sorted_by_path(class_folders):
    manifest, quarantine = read(class_folders)
    assert list(manifest.columns) == SCHEMA.names
    assert len(manifest) == 12
    assert manifest["path"].is_monotonic_increasing
    assert quarantine.empty


def test_an_image_is_named_by_the_sha256_of_its_bytes(class_folders):
    manifest, _ = read(class_folders)
    for row in manifest.itertuples():
        content = (class_folders / row.path).read_bytes()
        assert row.image_id == hashlib.sha256(content).hexdigest()
        assert row.num_bytes == len(content)


def test_sides_are_those_of_the_upright_image(tmp_path, draw):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "cat").mkdir()
    draw(0, (30, 10)).save(tmp_path / "cat" / "0.jpg", exif=exif)
    manifest, _ = read(tmp_path)
    assert (manifest["width"].item(), manifest["height"].item()) == (10, 30)


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA"])
def test_the_mode_is_kept(tmp_path, write, mode):
    write(tmp_path / "cat" / "0.png", 0, mode=mode)
    assert read(tmp_path)[0]["mode"].item() == mode


def test_the_same_bytes_give_the_same_manifest_whatever_the_order_of_creation(class_folders, tmp_path):
    again = tmp_path / "again"
    for path in sorted(class_folders.rglob("*.png"), reverse=True):
        copy = again / path.relative_to(class_folders)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    pd.testing.assert_frame_equal(read(class_folders)[0], read(again)[0])


def test_files_that_do_not_decode_are_set_aside_with_a_reason(class_folders):
    folder = class_folders / "cat"
    content = (folder / "0.png").read_bytes()
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not an image")
    (folder / "truncated.png").write_bytes(content[: len(content) // 2])
    manifest, quarantine = read(class_folders)
    assert len(manifest) == 12
    assert list(quarantine.columns) == QUARANTINE_SCHEMA.names
    reasons = quarantine.set_index("path")["reason"]
    assert list(reasons.index) == ["cat/empty.png", "cat/text.png", "cat/truncated.png"]
    assert reasons["cat/empty.png"] == "can't be decoded: it is none of PNG, JPEG, BMP, WEBP, TIFF"
    assert reasons["cat/text.png"] == "can't be decoded: it is none of PNG, JPEG, BMP, WEBP, TIFF"
    assert "truncated" in reasons["cat/truncated.png"].removeprefix("can't be decoded: ")
    assert set(quarantine["label"]) == {"cat"}


def test_a_link_to_nowhere_is_set_aside(class_folders):
    (class_folders / "cat" / "gone.png").symlink_to("nowhere.png")
    _, quarantine = read(class_folders)
    assert quarantine["path"].item() == "cat/gone.png"
    assert "No such file" in quarantine["reason"].item()


def test_a_folder_of_broken_files_gives_an_empty_manifest(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.png").write_bytes(b"")
    manifest, quarantine = read(tmp_path)
    assert manifest.empty
    assert len(quarantine) == 1


def test_equal_contents_have_equal_ids(class_folders):
    shutil.copyfile(class_folders / "cat" / "0.png", class_folders / "cat" / "copy.png")
    manifest, _ = read(class_folders)
    ids = manifest.set_index("path")["image_id"]
    assert ids["cat/copy.png"] == ids["cat/0.png"]
    assert ids.nunique() == 12


def test_perceptual_hashes_are_near_for_one_picture_in_two_sizes(tmp_path, draw):
    (tmp_path / "cat").mkdir()
    picture = draw(0, (256, 256))
    picture.save(tmp_path / "cat" / "0.png")
    picture.resize((200, 200)).save(tmp_path / "cat" / "1.jpg", quality=80)
    draw(1, (256, 256)).save(tmp_path / "cat" / "2.png")
    first, second, other = (int(value, 16) for value in read(tmp_path)[0]["phash"])
    assert (first ^ second).bit_count() <= 6
    assert (first ^ other).bit_count() >= 16


def test_a_saved_manifest_keeps_its_types_and_what_is_missing(mvtec, tmp_path):
    manifest, quarantine = read(mvtec)
    save_table(manifest, tmp_path / "tables" / "manifest.parquet", SCHEMA)
    save_table(quarantine, tmp_path / "tables" / "quarantine.parquet", QUARANTINE_SCHEMA)
    assert pq.read_schema(tmp_path / "tables" / "manifest.parquet").equals(SCHEMA)
    loaded = load_table(tmp_path / "tables" / "manifest.parquet")
    pd.testing.assert_frame_equal(loaded, manifest, check_dtype=False)
    assert loaded["mask_path"].notna().sum() == 3
    assert loaded["group"].isna().all()
    assert load_table(tmp_path / "tables" / "quarantine.parquet").empty


def test_saving_leaves_no_unfinished_file(tmp_path):
    save_table(pd.DataFrame({"number": np.arange(3)}), tmp_path / "table.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["table.parquet"]


def test_a_missing_table_says_how_to_make_it(tmp_path):
    with pytest.raises(DataError, match=r"table\.parquet is missing: run the stage that writes it"):
        load_table(tmp_path / "table.parquet")


ROWS = pd.DataFrame({"image_id": ["a", "b", "c"], "label": ["cat", "dog", "cat"], "split": ["train", "test", "val"]})


def test_the_digest_does_not_follow_the_order_of_rows():
    assert compute_data_digest(ROWS) == compute_data_digest(ROWS[::-1])


@pytest.mark.parametrize(("column", "value"), [("image_id", "z"), ("label", "cow"), ("split", "train")])
def test_the_digest_follows_every_value(column, value):
    changed = ROWS.copy()
    changed.loc[2, column] = value
    assert compute_data_digest(changed) != compute_data_digest(ROWS)
