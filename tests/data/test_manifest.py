import errno
import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFilter

from loupe.data import manifest as manifest_module
from loupe.data.images import decode_image
from loupe.data.manifest import (
    FACTS_SCHEMA,
    MASKS_SCHEMA,
    QUALITY_SCHEMA,
    QUARANTINE_SCHEMA,
    SCHEMA,
    build_facts,
    build_manifest,
    check_masks,
    compute_data_digest,
    compute_facts_version,
    load_table,
    save_table,
)
from loupe.data.sources import list_images
from loupe.errors import DataError


def test_there_is_one_row_an_image_sorted_by_path(class_folders, read):
    manifest, _, quarantine = read(class_folders)
    assert list(manifest.columns) == SCHEMA.names
    assert len(manifest) == 12
    assert manifest["path"].is_monotonic_increasing
    assert quarantine.empty


def test_an_image_is_named_by_the_sha256_of_its_bytes(class_folders, read):
    manifest, *_ = read(class_folders)
    for row in manifest.itertuples():
        content = (class_folders / row.path).read_bytes()
        assert row.image_id == hashlib.sha256(content).hexdigest()
        assert row.num_bytes == len(content)


def test_sides_are_those_of_the_upright_image(tmp_path, draw, read):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "cat").mkdir()
    draw(0, (30, 10)).save(tmp_path / "cat" / "0.jpg", exif=exif)
    manifest, *_ = read(tmp_path)
    assert (manifest["width"].item(), manifest["height"].item()) == (10, 30)


def test_files_of_sixteen_bits_are_measured_in_the_depth_of_the_deepest(tmp_path, read):
    (tmp_path / "cat").mkdir()
    ramp = np.tile(np.arange(64, dtype=np.uint16), (64, 1))
    for name, factor in (("dark", 15), ("light", 60)):  # up to 945, which needs 10 bits, and 3780, which needs 12
        Image.fromarray(ramp * factor).save(tmp_path / "cat" / f"{name}.png")
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "cat" / "plain.png")
    manifest, quality, _ = read(tmp_path)
    assert manifest["bits"].tolist()[:2] == [10, 12]
    assert np.isnan(manifest["bits"][2])
    rows = manifest.merge(quality, on="image_id").set_index("path")
    dark, light = rows.loc["cat/dark.png"], rows.loc["cat/light.png"]
    for name in ("brightness", "contrast"):
        assert light[name] == pytest.approx(4 * dark[name], rel=0.02)
    assert light["brightness"] == pytest.approx((ramp * 60 / 16).mean(), abs=1)
    assert max(dark["thumbnail"]) == pytest.approx(max(light["thumbnail"]) / 4, abs=1)
    save_table(manifest, tmp_path / "manifest.parquet", SCHEMA)
    assert load_table(tmp_path / "manifest.parquet")["bits"].tolist()[:2] == [10, 12]


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA"])
def test_the_mode_is_kept(tmp_path, write, mode, read):
    write(tmp_path / "cat" / "0.png", 0, mode=mode)
    assert read(tmp_path)[0]["mode"].item() == mode


def test_the_same_bytes_give_the_same_manifest_whatever_the_order_of_creation(class_folders, tmp_path, read):
    again = tmp_path / "again"
    for path in sorted(class_folders.rglob("*.png"), reverse=True):
        copy = again / path.relative_to(class_folders)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    for first, second in zip(read(class_folders), read(again), strict=True):
        pd.testing.assert_frame_equal(first, second)


def test_files_that_do_not_decode_are_set_aside_with_a_reason(class_folders, read):
    folder = class_folders / "cat"
    content = (folder / "0.png").read_bytes()
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not an image")
    (folder / "truncated.png").write_bytes(content[: len(content) // 2])
    manifest, _, quarantine = read(class_folders)
    assert len(manifest) == 12
    assert list(quarantine.columns) == QUARANTINE_SCHEMA.names
    reasons = quarantine.set_index("path")["reason"]
    assert list(reasons.index) == ["cat/empty.png", "cat/text.png", "cat/truncated.png"]
    assert reasons["cat/empty.png"] == "can't be decoded: it is empty"
    assert reasons["cat/text.png"] == "can't be decoded: it is none of PNG, JPEG, BMP, WEBP, TIFF"
    assert "truncated" in reasons["cat/truncated.png"].removeprefix("can't be decoded: ")
    assert set(quarantine["label"]) == {"cat"}


def test_a_link_to_nowhere_is_set_aside(class_folders, read):
    (class_folders / "cat" / "gone.png").symlink_to("nowhere.png")
    quarantine = read(class_folders)[2]
    assert quarantine["path"].item() == "cat/gone.png"
    assert quarantine["reason"].item() == "is a link to nothing"


def test_a_folder_of_broken_files_gives_an_empty_manifest(tmp_path, read):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.png").write_bytes(b"")
    manifest, _, quarantine = read(tmp_path)
    assert manifest.empty
    assert len(quarantine) == 1


def test_equal_contents_have_equal_ids(class_folders, read):
    shutil.copyfile(class_folders / "cat" / "0.png", class_folders / "cat" / "copy.png")
    manifest, *_ = read(class_folders)
    ids = manifest.set_index("path")["image_id"]
    assert ids["cat/copy.png"] == ids["cat/0.png"]
    assert ids.nunique() == 12


def test_perceptual_hashes_are_near_for_one_picture_in_two_sizes(tmp_path, draw, read):
    (tmp_path / "cat").mkdir()
    picture = draw(0, (256, 256))
    picture.save(tmp_path / "cat" / "0.png")
    picture.resize((200, 200)).save(tmp_path / "cat" / "1.jpg", quality=80)
    draw(1, (256, 256)).save(tmp_path / "cat" / "2.png")
    first, second, other = (int(value, 16) for value in read(tmp_path)[0]["phash"])
    assert (first ^ second).bit_count() <= 6
    assert (first ^ other).bit_count() >= 16


def quality_of(read, root, image):
    """The one row of quality of a folder with this image alone."""
    path = root / "cat" / "0.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return read(root)[1].iloc[0]


def test_there_is_one_row_of_quality_a_content_sorted_by_its_id(class_folders, read):
    shutil.copyfile(class_folders / "cat" / "0.png", class_folders / "cat" / "copy.png")
    manifest, quality, _ = read(class_folders)
    assert list(quality.columns) == QUALITY_SCHEMA.names
    assert list(quality["image_id"]) == sorted(set(manifest["image_id"]))


def test_brightness_and_contrast_are_mean_and_deviation_of_the_grey_values(read, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    quality = quality_of(read, tmp_path, Image.fromarray(pixels))
    assert quality["brightness"] == pytest.approx(pixels.mean())
    assert quality["contrast"] == pytest.approx(pixels.std())


@pytest.mark.parametrize("size", [(24, 20), (100, 37), (640, 480)])
def test_brightness_is_the_mean_grey_value_in_any_size(read, tmp_path, draw, size):
    image = draw(0, size, "L")
    assert quality_of(read, tmp_path, image)["brightness"] == pytest.approx(np.asarray(image).mean(), abs=1)


def test_a_flat_image_has_no_contrast_and_no_sharpness(read, tmp_path):
    quality = quality_of(read, tmp_path, Image.new("L", (30, 30), 77))
    assert (quality["brightness"], quality["contrast"], quality["sharpness"]) == (77, 0, 0)


def test_a_blurred_image_is_less_sharp(read, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 100), dtype=np.uint8))
    sharp = quality_of(read, tmp_path / "sharp", image)
    blurred = quality_of(read, tmp_path / "blurred", image.filter(ImageFilter.GaussianBlur(3)))
    assert blurred["sharpness"] < sharp["sharpness"] / 2


def test_a_thumbnail_is_a_small_grey_picture_row_by_row(read, tmp_path):
    pixels = np.zeros((160, 160), np.uint8)
    pixels[:10] = 200
    thumbnail = np.frombuffer(quality_of(read, tmp_path, Image.fromarray(pixels))["thumbnail"], np.uint8)
    assert thumbnail.reshape(16, 16)[0].tolist() == [200] * 16
    assert not thumbnail[16:].any()


@pytest.fixture
def count(monkeypatch):
    """Counts the files that are decoded."""
    decoded = []

    def decode(content, **options):
        decoded.append(content)
        return decode_image(content, **options)

    monkeypatch.setattr(manifest_module, "decode_image", decode)
    return lambda: len(decoded)


def test_facts_have_one_row_a_path(class_folders):
    facts = build_facts(class_folders, list_images(class_folders))
    assert list(facts.columns) == FACTS_SCHEMA.names
    assert len(facts) == 12


def test_known_files_are_not_read_again(class_folders, count):
    listing = list_images(class_folders)
    facts = build_facts(class_folders, listing)
    again = build_facts(class_folders, listing, facts)
    assert count() == 12
    pd.testing.assert_frame_equal(facts, again)


def test_new_and_changed_files_alone_are_decoded(class_folders, write, count):
    facts = build_facts(class_folders, list_images(class_folders))
    write(class_folders / "cat" / "new.png", 70)
    write(class_folders / "dog" / "0.png", 71, size=(30, 30))
    again = build_facts(class_folders, list_images(class_folders), facts)
    assert count() == 12 + 2
    pd.testing.assert_frame_equal(again, build_facts(class_folders, list_images(class_folders)))


def test_a_file_of_the_same_size_with_another_time_is_read_again(class_folders, count):
    facts = build_facts(class_folders, list_images(class_folders))
    os.utime(class_folders / "cat" / "0.png", ns=(0, 1))
    build_facts(class_folders, list_images(class_folders), facts)
    assert count() == 12 + 1


def test_removed_files_are_forgotten(class_folders):
    facts = build_facts(class_folders, list_images(class_folders))
    (class_folders / "cat" / "0.png").unlink()
    again = build_facts(class_folders, list_images(class_folders), facts)
    assert "cat/0.png" not in set(again["path"])
    assert len(again) == 11


def test_facts_of_another_order_serve_as_well(class_folders, count):
    listing = list_images(class_folders)
    facts = build_facts(class_folders, listing)
    again = build_facts(class_folders, listing, facts.sample(frac=1, random_state=0))
    assert count() == 12
    pd.testing.assert_frame_equal(facts, again)


def test_facts_that_were_saved_give_the_same_manifest(class_folders, write, tmp_path):
    (class_folders / "cat" / "bad.png").write_bytes(b"")
    save_table(build_facts(class_folders, list_images(class_folders)), tmp_path / "facts.parquet")
    write(class_folders / "cat" / "new.png", 70, size=(31, 17))
    listing = list_images(class_folders)
    remembered = build_facts(class_folders, listing, load_table(tmp_path / "facts.parquet"))
    fresh = build_facts(class_folders, listing)
    schemas = (SCHEMA, QUALITY_SCHEMA, QUARANTINE_SCHEMA)
    for schema, old, new in zip(
        schemas, build_manifest(listing, remembered), build_manifest(listing, fresh), strict=True
    ):
        save_table(old, tmp_path / "old.parquet", schema)
        save_table(new, tmp_path / "new.parquet", schema)
        assert (tmp_path / "old.parquet").read_bytes() == (tmp_path / "new.parquet").read_bytes()


def test_facts_of_bad_files_alone_can_be_saved_and_known(tmp_path):
    (tmp_path / "pets" / "cat").mkdir(parents=True)
    (tmp_path / "pets" / "cat" / "0.png").write_bytes(b"")
    listing = list_images(tmp_path / "pets")
    save_table(build_facts(tmp_path / "pets", listing), tmp_path / "facts.parquet")
    facts = build_facts(tmp_path / "pets", listing, load_table(tmp_path / "facts.parquet"))
    assert facts["reason"].str.startswith("can't be decoded").tolist() == [True]


def test_a_file_that_could_not_be_read_for_a_while_is_read_again(class_folders, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    listing = list_images(class_folders)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        facts = build_facts(class_folders, listing)
    assert facts["reason"].tolist() == ["Input/output error"] * 12
    assert build_facts(class_folders, listing, facts)["reason"].isna().all()


def test_the_version_of_facts_is_a_digest_that_stays():
    assert compute_facts_version() == compute_facts_version()
    assert len(compute_facts_version()) == 64


def test_good_masks_have_no_problem(mvtec, read):
    masks = check_masks(mvtec, read(mvtec)[0])
    assert list(masks.columns) == MASKS_SCHEMA.names
    assert masks["path"].tolist() == [f"test/scratch/{n}.png" for n in range(3)]
    assert masks["problem"].isna().all()


@pytest.mark.parametrize(
    ("mask", "problem"),
    [
        (Image.new("L", (24, 21), 255), "it is 24 x 21, and its image 24 x 20"),
        (Image.new("L", (20, 24), 255), "it is 20 x 24, and its image 24 x 20"),
        (Image.new("L", (24, 20), 0), "it marks nothing"),
        (Image.new("1", (24, 20), 0), "it marks nothing"),
        (Image.new("RGB", (24, 20), 0), "it marks nothing"),
        (Image.new("L", (24, 20), 1), None),
        (Image.new("RGB", (24, 20), (0, 0, 2)), None),
        (Image.new("RGBA", (24, 20), (0, 0, 0, 255)), "it marks nothing"),
        (Image.new("1", (24, 20), 1), None),
        (Image.new("I;16", (24, 20), 1), None),
    ],
)
def test_a_mask_must_have_its_images_size_and_mark_something(mvtec, read, mask, problem):
    mask.save(mvtec / "ground_truth" / "scratch" / "1_mask.png")
    found = check_masks(mvtec, read(mvtec)[0]).set_index("path")["problem"]
    assert found.drop("test/scratch/1.png").isna().all()
    assert found["test/scratch/1.png"] == problem or (problem is None and pd.isna(found["test/scratch/1.png"]))


def test_a_mask_that_does_not_decode_has_a_problem_without_the_folders_name(mvtec, read):
    (mvtec / "ground_truth" / "scratch" / "1_mask.png").write_bytes(b"")
    problem = check_masks(mvtec, read(mvtec)[0])["problem"][1]
    assert problem == "can't be decoded: it is empty"


def test_a_mask_that_is_a_link_out_of_the_folder_has_a_problem(mvtec, read, tmp_path):
    mask = mvtec / "ground_truth" / "scratch" / "1_mask.png"
    mask.rename(tmp_path / "outside.png")
    mask.symlink_to(tmp_path / "outside.png")
    assert "link" in str(check_masks(mvtec, read(mvtec)[0])["problem"][1])


def test_without_masks_there_is_no_row(class_folders, read):
    assert check_masks(class_folders, read(class_folders)[0]).empty


def test_a_saved_manifest_keeps_its_types_and_what_is_missing(mvtec, tmp_path, read):
    manifest, _, quarantine = read(mvtec)
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
