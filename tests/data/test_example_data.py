"""What must hold on real pictures, where the example data sets lie beside the working tree."""

import pytest

from loupe.data.duplicates import compute_clusters, find_near_duplicates
from loupe.data.split import Fractions, assign_splits, find_leaks, list_contents

OURS = ("train", "val", "calibration")


@pytest.fixture(scope="module")
def tiles(repository, read):
    """Contents of the magnetic tiles with their clusters, and the pairs that look alike."""
    root = repository.parent / "shared" / "datasets" / "magnetic_tile"
    if not root.is_dir():
        pytest.skip("the magnetic tiles are not here")
    manifest, quality, quarantine = read(root)
    assert quarantine.empty
    pairs = find_near_duplicates(manifest.drop_duplicates("image_id")[["image_id", "label", "phash"]].merge(quality))
    contents = list_contents(manifest)
    return contents.assign(cluster=compute_clusters(contents, pairs)), pairs


def test_photos_of_one_tile_are_found_to_be_near_duplicates(tiles):
    contents, pairs = tiles
    assert len(pairs) > 20
    labels = contents.set_index("image_id")["label"]
    assert (labels[pairs["first"]].to_numpy() == labels[pairs["second"]].to_numpy()).mean() > 0.9


@pytest.mark.parametrize("seed", range(5))
def test_no_two_photos_of_one_tile_are_parted_by_what_is_carved(tiles, seed):
    contents, pairs = tiles
    splits = assign_splits(contents, Fractions(0.1, 0.1, 0.2), seed)
    assert set(splits["split"]) == {*OURS, "test"}
    ours = contents.merge(splits[splits["split"].isin(OURS)], on="image_id")
    assert find_leaks(ours, pairs, "split").empty


def test_the_given_test_set_is_kept(tiles):
    contents, _ = tiles
    rows = contents.merge(assign_splits(contents, Fractions(0.1, 0.1, 0.2), 0), on="image_id")
    assert (rows["given_split"].eq("test") == rows["split"].eq("test")).all()
