import gzip
import shutil

import numpy as np
import pytest
from PIL import Image

from loupe.data import fashion_mnist
from loupe.data.fashion_mnist import LABELS, SHA256, obtain_files, unpack, write_images
from loupe.errors import DataError

NAMES = list(SHA256)


@pytest.fixture(scope="session")
def published(repository):
    """The folder with the four files as they were published."""
    folder = repository / "data" / "downloads"
    if not all((folder / name).is_file() for name in NAMES):
        pytest.skip("the files of Fashion-MNIST are not in data/downloads: run `dvc repro fetch` first")
    return folder


@pytest.fixture
def unreachable(monkeypatch):
    """No network: nothing answers at the project's address, and the package can't be had."""

    def fail(folder):
        raise OSError("there is no network")

    monkeypatch.setattr(fashion_mnist, "PROJECT", "http://127.0.0.1:9")  # the port of nobody
    monkeypatch.setattr(fashion_mnist, "_extract_package", fail)


@pytest.fixture
def no_sources(monkeypatch):
    """Fails if either source is asked for anything."""

    def refuse(folder):
        raise AssertionError("nothing was to be fetched")

    monkeypatch.setattr(fashion_mnist, "_download", refuse)
    monkeypatch.setattr(fashion_mnist, "_extract_package", refuse)


def test_files_that_are_there_are_not_fetched(published, no_sources):
    obtain_files(published)


@pytest.mark.parametrize("source", ["_download", "_extract_package"])
def test_either_source_will_do(published, unreachable, monkeypatch, tmp_path, source):
    def deliver(folder):
        (folder / "deep").mkdir()
        for name in NAMES:
            shutil.copyfile(published / name, folder / "deep" / name)

    monkeypatch.setattr(fashion_mnist, source, deliver)
    obtain_files(tmp_path / "downloads")
    assert sorted(path.name for path in (tmp_path / "downloads").iterdir()) == sorted(NAMES)


def test_without_a_source_the_error_names_both_and_the_way_out(unreachable, tmp_path):
    with pytest.raises(DataError) as caught:
        obtain_files(tmp_path)
    message = str(caught.value)
    assert "can't be had from its project over HTTPS (" in message
    assert "nor from Debian's package dataset-fashion-mnist (there is no network)" in message
    assert message.endswith(f"put {', '.join(NAMES)} into {tmp_path} by hand")
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_delivers_other_files_is_not_trusted(unreachable, monkeypatch, tmp_path):
    def deliver(folder):
        for name in NAMES:
            (folder / name).write_bytes(gzip.compress(b"something else"))

    monkeypatch.setattr(fashion_mnist, "_download", deliver)
    with pytest.raises(DataError, match="is not the published file"):
        obtain_files(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_delivers_nothing_is_a_data_error(unreachable, monkeypatch, tmp_path):
    monkeypatch.setattr(fashion_mnist, "_download", lambda folder: None)
    with pytest.raises(DataError, match="can't be had"):
        obtain_files(tmp_path)


def test_another_file_under_a_published_name_is_a_data_error(no_sources, tmp_path):
    (tmp_path / NAMES[0]).write_bytes(gzip.compress(b"something else"))
    with pytest.raises(DataError, match=r"is not the published file \(its sha256 differs\): remove it"):
        unpack(tmp_path / NAMES[0])


PACKED = gzip.compress(bytes(range(256)) * 8)


@pytest.mark.parametrize(
    "content",
    [b"", b"text", PACKED[: len(PACKED) // 2], PACKED[:10] + b"\xff" * 40],
    ids=["empty", "text", "truncated", "damaged"],
)
def test_a_broken_file_is_a_data_error(tmp_path, content):
    (tmp_path / NAMES[0]).write_bytes(content)
    with pytest.raises(DataError, match="remove it and fetch again"):
        unpack(tmp_path / NAMES[0])


@pytest.fixture(scope="module")
def small(published, tmp_path_factory):
    """A part of about a thousandth, written once."""
    folder = tmp_path_factory.mktemp("fashion") / "images"
    return folder, write_images(published, folder, 0.001, seed=0)


def test_a_part_is_taken_alike_from_each_class(small):
    folder, num_images = small
    counts = {
        (split, label): len(list((folder / split / label).glob("*.png")))
        for split in ("train", "test")
        for label in LABELS
    }
    assert set(counts.values()) == {6, 1}
    assert all(count == (6 if split == "train" else 1) for (split, _), count in counts.items())
    assert num_images == 70 == len(list(folder.rglob("*.png")))


def test_an_image_is_the_row_of_its_number(published, small):
    folder, _ = small
    images = np.frombuffer(unpack(published / NAMES[0]), np.uint8, offset=16).reshape(-1, 28, 28)
    labels = np.frombuffer(unpack(published / NAMES[1]), np.uint8, offset=8)
    for path in sorted((folder / "train").rglob("*.png")):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), images[int(path.stem)])
        assert LABELS[labels[int(path.stem)]] == path.parent.name


def test_the_same_seed_takes_the_same_images_and_another_seed_others(published, small, tmp_path):
    def numbers(folder):
        return {str(path.relative_to(folder)) for path in folder.rglob("*.png")}

    write_images(published, tmp_path / "again", 0.001, seed=0)
    write_images(published, tmp_path / "other", 0.001, seed=1)
    assert numbers(tmp_path / "again") == numbers(small[0])
    assert numbers(tmp_path / "other") != numbers(small[0])
