import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageEnhance

from loupe.data import duplicates
from loupe.data.duplicates import compute_clusters, find_near_duplicates

BITS = np.array([value.bit_count() for value in range(256)])


def looks_of(manifest, quality):
    return manifest.drop_duplicates("image_id")[["image_id", "label", "phash"]].merge(quality, on="image_id")


@pytest.fixture
def find(tmp_path, read):
    """Saves pictures, reads them back, and returns pairs of the names of those that look alike."""

    def find(**pictures):
        folder = tmp_path / "pets" / "cat"
        folder.mkdir(parents=True)
        for name, (image, suffix, options) in pictures.items():
            image.save(folder / f"{name}{suffix}", **options)
        manifest, quality, _ = read(folder.parent)
        names = manifest.set_index("image_id")["path"].str.extract(r"cat/(\w+)", expand=False)
        pairs = find_near_duplicates(looks_of(manifest, quality))
        return {frozenset({names[pair.first], names[pair.second]}) for pair in pairs.itertuples()}

    return find


def png(image):
    return image, ".png", {}


def test_a_brighter_copy_is_found(find, draw):
    picture = draw(0, (200, 160))
    assert find(a=png(picture), b=png(ImageEnhance.Brightness(picture).enhance(1.15))) == {frozenset("ab")}


def test_a_darker_copy_of_less_contrast_is_found(find, draw):
    picture = draw(0, (200, 160))
    faint = picture.point(lambda value: 20 + value // 2)
    assert find(a=png(picture), b=png(faint)) == {frozenset("ab")}


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_a_recompressed_copy_is_found(find, draw, suffix):
    picture = draw(0, (200, 160))
    assert find(a=png(picture), b=(picture, suffix, {"quality": 40})) == {frozenset("ab")}


@pytest.mark.parametrize("size", [(190, 152), (210, 168), (100, 80), (200, 158)])
def test_a_resized_copy_is_found(find, draw, size):
    picture = draw(0, (200, 160))
    assert find(a=png(picture), b=png(picture.resize(size))) == {frozenset("ab")}


def test_a_copy_that_was_brightened_recompressed_and_resized_is_found(find, draw):
    picture = draw(0, (200, 160))
    copy = ImageEnhance.Brightness(picture).enhance(1.1).resize((188, 150))
    assert find(a=png(picture), b=(copy, ".jpg", {"quality": 70})) == {frozenset("ab")}


def test_a_grey_copy_is_found(find, draw):
    picture = draw(0, (200, 160))
    assert find(a=png(picture), b=png(picture.convert("L"))) == {frozenset("ab")}


@pytest.mark.parametrize("cell", [4, 8, 16])
def test_different_textures_are_no_pairs(find, cell):
    def texture(seed):
        pixels = np.random.default_rng(seed).integers(0, 256, (128 // cell, 128 // cell), dtype=np.uint8)
        return png(Image.fromarray(pixels).resize((128, 128)))

    assert find(**{f"n{seed}": texture(seed) for seed in range(12)}) == set()


def test_a_mirrored_picture_is_no_pair(find, draw):
    picture = draw(0, (200, 160))
    assert find(a=png(picture), b=png(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT))) == set()


def test_flat_images_are_no_pairs(find):
    flat = {f"n{grey}": png(Image.new("L", (32, 32), grey)) for grey in range(0, 250, 25)}
    speck = Image.new("L", (32, 32), 7)
    speck.putpixel((3, 3), 9)
    assert find(**flat, speck=png(speck)) == set()


def test_copies_of_the_same_bytes_are_one_content_and_no_pair(class_folders, read):
    shutil.copyfile(class_folders / "cat" / "0.png", class_folders / "cat" / "copy.png")
    manifest, quality, _ = read(class_folders)
    assert find_near_duplicates(looks_of(manifest, quality)).empty


@pytest.fixture
def looks():
    """Three hundred contents, a third of which are one of ten pictures with a little noise; some are flat."""
    generator = np.random.default_rng(0)
    originals = generator.integers(0, 256, (10, 256))
    hashes = generator.integers(0, 256, (10, 8), dtype=np.uint8)
    rows = []
    for number in range(300):
        if number % 3:
            thumbnail, phash = generator.integers(0, 256, 256), generator.integers(0, 256, 8, dtype=np.uint8)
        else:
            kind = generator.integers(10)
            thumbnail = np.clip(originals[kind] + generator.normal(0, generator.choice([3, 14, 18]), 256), 0, 255)
            flipped = 1 << generator.integers(0, 8, 8)
            phash = hashes[kind] ^ np.where(generator.random(8) < 0.5, flipped, 0).astype(np.uint8)
        thumbnail = thumbnail if generator.random() < 0.9 else np.full(256, 100)
        rows.append((f"{generator.integers(2**60):064x}", bytes(phash).hex(), thumbnail.astype(np.uint8)))
    table = pd.DataFrame(rows, columns=["image_id", "phash", "thumbnail"])
    return table.assign(label="cat", thumbnail=[thumbnail.tobytes() for thumbnail in table["thumbnail"]])


def compare_one_by_one(looks):
    """Two loops over numpy's own correlation: slow and obvious."""
    deviations = looks["thumbnail"].map(lambda one: np.frombuffer(one, np.uint8).std())
    rows = looks[deviations >= duplicates.MIN_DEVIATION].sort_values("image_id").to_dict("records")
    for row in rows:
        row["pixels"] = np.frombuffer(row["thumbnail"], np.uint8).astype(float)
        row["bytes"] = np.frombuffer(bytes.fromhex(row["phash"]), np.uint8)
    found = []
    for place, first in enumerate(rows):
        for second in rows[place + 1 :]:
            distance = int(BITS[first["bytes"] ^ second["bytes"]].sum())
            if distance > duplicates.MAX_HASH_DISTANCE:
                continue
            correlation = np.corrcoef(first["pixels"], second["pixels"])[0, 1]
            if 1 - correlation <= duplicates.MAX_DISTANCE:
                found.append((first["image_id"], second["image_id"], correlation, distance))
    return pd.DataFrame(found, columns=["first", "second", "correlation", "hash_distance"])


@pytest.mark.parametrize("block", [1, 7, 64, 4096])
def test_the_search_equals_comparing_one_by_one_whatever_the_block(looks, monkeypatch, block):
    monkeypatch.setattr(duplicates, "BLOCK", block)
    expected = compare_one_by_one(looks)
    assert 20 < len(expected) < 2000
    pd.testing.assert_frame_equal(find_near_duplicates(looks), expected, check_dtype=False, atol=1e-5)


@pytest.mark.parametrize("crowded", [0.0, 1.0])
def test_the_search_is_the_same_pair_by_pair_and_by_a_product(looks, monkeypatch, crowded):
    pairs = find_near_duplicates(looks)
    monkeypatch.setattr(duplicates, "CROWDED", crowded)
    pd.testing.assert_frame_equal(find_near_duplicates(looks), pairs, atol=1e-5)


def photograph(generator, part):
    """A part under a fixed camera: a little moved, and with the noise of a sensor."""
    moved = part.rotate(generator.normal(0, 1), translate=tuple(generator.normal(0, 2, 2)), resample=Image.BILINEAR)
    noisy = np.asarray(moved) + generator.normal(0, 4, (part.height, part.width, 1))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def test_like_parts_under_a_fixed_camera_are_no_copies_of_each_other(find, draw):
    generator, part = np.random.default_rng(0), draw(0, (128, 128)).resize((256, 256))
    photos = {f"part{number}": photograph(generator, part) for number in range(40)}
    copy = photos["part7"].point(lambda value: 10 + value * 9 // 10)
    pairs = find(**{name: png(photo) for name, photo in photos.items()}, copy=png(copy))
    assert frozenset({"part7", "copy"}) in pairs
    assert len(pairs) <= 5


def test_pairs_do_not_follow_the_order_of_rows(looks):
    pairs = find_near_duplicates(looks)
    pd.testing.assert_frame_equal(find_near_duplicates(looks.sample(frac=1, random_state=0)), pairs)


def test_finding_does_not_change_its_table(looks):
    before = looks.copy()
    find_near_duplicates(looks)
    pd.testing.assert_frame_equal(looks, before)


@pytest.mark.parametrize("num_images", [0, 1])
def test_fewer_than_two_images_make_no_pair(looks, num_images):
    pairs = find_near_duplicates(looks[:num_images])
    assert pairs.empty
    assert list(pairs.columns) == ["first", "second", "correlation", "hash_distance"]


def contents_of(groups):
    """Contents a, b, c, ... with a group each."""
    return pd.DataFrame({"image_id": list("abcdefgh"[: len(groups)]), "group": groups}).astype("str")


def pairs_of(*names):
    return pd.DataFrame([tuple(name) for name in names], columns=["first", "second"], dtype="str")


def partition(clusters):
    return sorted("".join("abcdefgh"[place] for place in np.flatnonzero(clusters == one)) for one in set(clusters))


@pytest.mark.parametrize(
    ("groups", "pairs", "expected"),
    [
        ([None] * 4, (), ["a", "b", "c", "d"]),
        ([None] * 4, ("ab",), ["ab", "c", "d"]),
        ([None] * 4, ("ab", "bc"), ["abc", "d"]),
        ([None] * 5, ("ae", "bd", "de"), ["abde", "c"]),
        (["x", None, "x", None], (), ["ac", "b", "d"]),
        (["x", "y", "x", "y"], (), ["ac", "bd"]),
        (["x", "y", "x", "y"], ("ab",), ["abcd"]),
        (["x", None, "x", None], ("cd",), ["acd", "b"]),
        ([], (), []),
    ],
)
def test_clusters_join_pairs_and_groups_directly_and_through_others(groups, pairs, expected):
    assert partition(compute_clusters(contents_of(groups), pairs_of(*pairs))) == expected
