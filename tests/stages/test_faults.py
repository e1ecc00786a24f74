"""Faults put into a data set on purpose: each is found by the stage that must find it, and its files are named."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image, ImageEnhance


class Project:
    """A folder in which stages run as processes on a folder of images."""

    def __init__(self, place, repository):
        self.place, self.repository = place, repository

    def run(self, root, *stages):
        """Returns the last stage's exit code, and what all of them said."""
        self.place.mkdir(exist_ok=True)
        params = yaml.safe_load((self.repository / "params.yaml").read_text())
        params["ingest"]["source"] = str(root)
        (self.place / "params.yaml").write_text(yaml.safe_dump(params))
        environment = {**os.environ, "PYTHONPATH": str(self.repository / "src")}
        told = ""
        for stage in stages:
            command = [sys.executable, "-m", "loupe.stages", stage]
            done = subprocess.run(
                command, cwd=self.place, env=environment, capture_output=True, text=True, timeout=60, check=False
            )
            told += done.stdout + done.stderr
            assert "Traceback" not in told, told
            if done.returncode:
                break
        return done.returncode, told

    def load(self, name):
        """A table that a stage wrote."""
        return pd.read_parquet(self.place / "data" / name)

    def load_finding(self, start):
        """The finding whose sentence starts so."""
        findings = json.loads((self.place / "reports" / "validation.json").read_text())["findings"]
        return next(finding for finding in findings if finding["sentence"].startswith(start))


@pytest.fixture
def project(repository, tmp_path):
    return Project(tmp_path / "project", repository)


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def describe_folder(root):
    """Names, times and bytes of all that is in a folder."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in [root, *root.rglob("*")]
    }


def draw_many(root, write):
    """A hundred images of each of two labels."""
    for number in range(100):
        write(root / "cat" / f"{number:03d}.png", number)
        write(root / "dog" / f"{number:03d}.png", 1000 + number)


@pytest.fixture
def many(tmp_path, write):
    draw_many(tmp_path / "many", write)
    return tmp_path / "many"


@pytest.fixture(scope="module")
def faulty(repository, tmp_path_factory, write):
    """A project whose bolts have a swapped label, a mask of the wrong size and an empty one; and what it said."""
    folder = tmp_path_factory.mktemp("faulty")
    root = folder / "bolts"
    for number in range(8):
        write(root / "train" / "good" / f"{number}.png", number)
    for number in range(4):
        write(root / "test" / "scratch" / f"{number}.png", 30 + number)
        (root / "ground_truth" / "scratch").mkdir(parents=True, exist_ok=True)
        size, grey = ((12, 10), 255) if number == 1 else ((24, 20), 0 if number == 2 else 255)
        Image.new("L", size, grey).save(root / "ground_truth" / "scratch" / f"{number}_mask.png")
    (root / "test" / "dent").mkdir()
    shutil.copyfile(root / "test" / "scratch" / "3.png", root / "test" / "dent" / "swapped.png")
    project = Project(folder / "project", repository)
    return project, *project.run(root, "ingest", "validate")


def test_a_swapped_label_stops_and_names_both_files(faulty):
    project, code, text = faulty
    finding = project.load_finding("Every content has one label")
    assert code == 1
    assert (finding["severity"], finding["success"]) == ("critical", False)
    assert [file.partition(" ")[0] for file in finding["files"]] == ["test/dent/swapped.png", "test/scratch/3.png"]
    assert all(file in text.partition("error: ")[2] for file in finding["files"])


@pytest.mark.parametrize(
    "file",
    [
        "test/scratch/1.png (mask problem: it is 12 x 10, and its image 24 x 20)",
        "test/scratch/2.png (mask problem: it marks nothing)",
    ],
    ids=["wrong_size", "empty"],
)
def test_a_bad_mask_stops_and_is_named(faulty, file):
    project, code, text = faulty
    finding = project.load_finding("Every mask")
    assert code == 1
    assert (finding["severity"], finding["success"], finding["num_failing"]) == ("critical", False, 2)
    assert file in finding["files"]
    assert file in text.partition("error: ")[2]


def test_what_stopped_validate_says_how_to_go_on(faulty):
    assert faulty[2].rstrip().endswith("or change the limits under `validate` in params.yaml")


def test_five_percent_of_truncated_files_stop_and_are_named_with_reasons(project, many):
    for number in range(10):
        truncate(many / "cat" / f"{number:03d}.png")
    code, text = project.run(many, "ingest", "validate")
    assert code == 1
    error = text.partition("error: ")[2]
    assert "10 of the files fail this" in error
    assert "cat/000.png (can't be decoded: " in error
    quarantine = project.load("ingest/quarantine.parquet")
    assert quarantine["path"].tolist() == [f"cat/{number:03d}.png" for number in range(10)]
    assert quarantine["reason"].str.startswith("can't be decoded: ").all()


@pytest.fixture(scope="module")
def nearly_good(repository, tmp_path_factory, write):
    """A project of two hundred images of which one is truncated; its source before and after, and what was said."""
    folder = tmp_path_factory.mktemp("nearly_good")
    root = folder / "many"
    draw_many(root, write)
    truncate(root / "dog" / "042.png")
    before = describe_folder(root)
    project = Project(folder / "project", repository)
    code, text = project.run(root, "ingest", "validate", "split")
    assert code == 0, text
    return project, before, describe_folder(root)


def test_half_a_percent_of_truncated_files_goes_on_and_is_set_aside(nearly_good):
    project, *_ = nearly_good
    assert project.load("ingest/quarantine.parquet")["path"].tolist() == ["dog/042.png"]
    assert project.load_finding("Every file decodes")["num_failing"] == 1
    assert len(project.load("split/splits.parquet")) == 199


def test_the_source_folder_stays_as_it_was(nearly_good):
    _, before, after = nearly_good
    assert after == before


def test_near_duplicates_across_given_splits_are_reported_as_a_pair_and_the_run_goes_on(project, split_folders, draw):
    picture = draw(7, (200, 160))
    picture.save(split_folders / "train" / "cat" / "photo.png")
    ImageEnhance.Brightness(picture).enhance(1.1).save(split_folders / "test" / "cat" / "again.png")
    code, text = project.run(split_folders, "ingest", "validate", "split")
    assert code == 0, text
    finding = project.load_finding("Near-duplicates")
    assert finding["files"] == [
        "test/cat/again.png (near duplicate: train/cat/photo.png)",
        "train/cat/photo.png (near duplicate: test/cat/again.png)",
    ]
    assert finding["files"][0] in text


def test_one_content_in_two_given_splits_is_told_and_kept_in_test_alone(project, split_folders):
    shutil.copyfile(split_folders / "train" / "cat" / "0.png", split_folders / "test" / "cat" / "copy.png")
    code, text = project.run(split_folders, "ingest", "split")
    assert code == 0, text
    assert "test/cat/copy.png, train/cat/0.png" in text
    content = hashlib.sha256((split_folders / "test" / "cat" / "copy.png").read_bytes()).hexdigest()
    assert project.load("split/splits.parquet").set_index("image_id").at[content, "split"] == "test"


def test_what_is_ingested_again_is_not_read_again(project, class_folders, write):
    project.run(class_folders, "ingest")
    before = project.load("ingest/manifest.parquet")
    for path in class_folders.rglob("*.png"):  # as if they had never been touched, but unreadable
        status = path.stat()
        path.write_bytes(bytes(status.st_size))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    write(class_folders / "dog" / "new.png", 70)
    code, text = project.run(class_folders, "ingest")
    assert code == 0, text
    after = project.load("ingest/manifest.parquet")
    assert set(after["path"]) - set(before["path"]) == {"dog/new.png"}
    pd.testing.assert_frame_equal(after[after["path"].ne("dog/new.png")].reset_index(drop=True), before)


def test_a_bad_file_that_was_mended_is_taken_in_again(project, class_folders):
    path = class_folders / "cat" / "0.png"
    content = path.read_bytes()
    path.write_bytes(b"")
    project.run(class_folders, "ingest")
    path.write_bytes(content)
    project.run(class_folders, "ingest")
    assert project.load("ingest/quarantine.parquet").empty
    assert len(project.load("ingest/manifest.parquet")) == 12


def test_the_memory_of_one_folder_is_not_taken_for_another(project, class_folders, tmp_path):
    project.run(class_folders, "ingest")
    other = tmp_path / "other"
    shutil.copytree(class_folders, other)  # with the same times
    path = other / "cat" / "0.png"
    status = path.stat()
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    project.run(other, "ingest")
    assert project.load("ingest/quarantine.parquet")["path"].tolist() == ["cat/0.png"]


def test_the_same_bytes_give_the_same_tables_whatever_the_order_of_creation(project, many, tmp_path):
    truncate(many / "dog" / "042.png")
    again = tmp_path / "again" / "many"
    paths = sorted(many.rglob("*.png"))
    for number in np.random.default_rng(0).permutation(len(paths)):
        copy = again / paths[number].relative_to(many)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(paths[number], copy)
    tables = [f"ingest/{name}.parquet" for name in ("manifest", "quality", "masks", "quarantine")]
    tables += ["split/splits.parquet"]
    digests = []
    for root in (many, again):
        project.run(root, "ingest", "split")
        digests.append({table: (project.place / "data" / table).read_bytes() for table in tables})
        shutil.rmtree(project.place)
    assert digests[0] == digests[1]


def test_images_that_were_divided_stay_in_their_splits_when_others_are_added(project, class_folders, write):
    project.run(class_folders, "ingest", "split")
    before = project.load("split/splits.parquet")
    for number in range(10):
        write(class_folders / "cat" / f"new{number}.png", 300 + number)
    code, text = project.run(class_folders, "ingest", "split")
    assert code == 0, text
    after = project.load("split/splits.parquet")
    assert len(after) == 22
    kept = after[after["image_id"].isin(before["image_id"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, before)
