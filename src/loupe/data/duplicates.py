"""Near-duplicates: pairs of images that an eye takes for the same picture, and the clusters that they make."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
from jaxtyping import Float, Int64, UInt8, UInt64
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from loupe.data.manifest import THUMBNAIL_SIDE

# Between photos of one tile at other exposures, and between different clothes of one cut, these two together part best:
# a perceptual hash alone takes all trousers for one picture, thumbnails alone take all plain surfaces for one.
MAX_DISTANCE = 0.02  # 1 less the correlation of two thumbnails
MAX_HASH_DISTANCE = 8  # bits of 64
# Under a fixed camera all parts look alike, and each would be taken for a copy of the next. So a pair must also stand
# out: two photos of one tile are thirty times nearer to each other than two photos of tiles usually are.
MIN_RATIO = 30.0
FEW_IMAGES, NUM_SAMPLED = 20, 2000
MIN_DEVIATION = 2.0  # grey values; a flatter thumbnail is noise
BLOCK = 2048
CROWDED = 0.02  # part of a block's pairs with near hashes above which one matrix product is cheaper than pair by pair

Vectors = Float[np.ndarray, "num_images num_pixels"]
Hashes = UInt64[np.ndarray, " num_images"]
Pairs = Float[np.ndarray, "num_pairs 4"]


def find_near_duplicates(contents: pd.DataFrame) -> pd.DataFrame:
    """All pairs of contents whose perceptual hashes are near and whose thumbnails correlate.

    The search is exact, by blocks in parallel: time grows with the square of the number of images (about ten seconds
    for 100,000 on two cores), memory does not.

    Args:
        contents: image_id, label, phash and thumbnail, one row a content.

    Returns:
        first, second (image_ids, first < second), correlation in [-1, 1] and hash_distance in bits; sorted.
    """
    rows = contents.sort_values("image_id")
    pixels = np.frombuffer(b"".join(rows["thumbnail"]), np.uint8).reshape(len(rows), THUMBNAIL_SIDE**2)
    telling = pixels.std(axis=1) >= MIN_DEVIATION
    rows, vectors = rows[telling], _normalise(pixels[telling])
    hashes = np.frombuffer(bytes.fromhex("".join(rows["phash"])), np.uint64)
    distances = _choose_distances(rows["label"].to_numpy(), vectors)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda block: _compare_blocks(vectors, hashes, distances, *block), _list_blocks(len(rows)))
        pairs = np.concatenate([np.empty((0, 4)), *found])
    ids = rows["image_id"].to_numpy()
    table = pd.DataFrame(
        {
            "first": ids[pairs[:, 0].astype(np.int64)],
            "second": ids[pairs[:, 1].astype(np.int64)],
            "correlation": pairs[:, 2],
            "hash_distance": pairs[:, 3].astype(np.int64),
        }
    )
    return table.sort_values(["first", "second"], ignore_index=True)


def _list_blocks(num_images: int) -> Iterator[tuple[int, int]]:
    """Where the blocks of the upper triangle start."""
    return ((top, left) for top in range(0, num_images, BLOCK) for left in range(top, num_images, BLOCK))


def _choose_distances(labels: np.ndarray, vectors: Vectors) -> Float[np.ndarray, " num_images"]:
    """How near another thumbnail must be to each, by how near those of its label usually are.

    A label of few images takes the usual distance of the whole set; a set of few images has none.
    """
    chosen = np.full(len(labels), _compute_usual_distance(vectors))
    for label in pd.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) >= FEW_IMAGES:
            chosen[members] = _compute_usual_distance(vectors[members])
    return np.minimum(MAX_DISTANCE, chosen / MIN_RATIO)


def _compute_usual_distance(vectors: Vectors) -> float:
    """The median over random pairs; infinite where there are too few images to tell."""
    if len(vectors) < FEW_IMAGES:
        return np.inf
    generator = np.random.default_rng(0)
    first = generator.integers(len(vectors), size=NUM_SAMPLED)
    second = (first + generator.integers(1, len(vectors), size=NUM_SAMPLED)) % len(vectors)
    return float(np.median(1 - np.einsum("ij,ij->i", vectors[first], vectors[second])))


def _normalise(pixels: UInt8[np.ndarray, "num_images num_pixels"]) -> Float[np.ndarray, "num_images num_pixels"]:
    """Thumbnails with mean 0 and length 1, so that a product is a correlation."""
    centred = pixels.astype(np.float32)
    centred -= centred.mean(axis=1, keepdims=True)
    centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6)
    return centred


def _compare_blocks(
    vectors: Vectors, hashes: Hashes, distances: Float[np.ndarray, " num_images"], top: int, left: int
) -> Pairs:
    """Pairs between two blocks of images: their positions, correlation and hash distance."""
    rows, columns = slice(top, top + BLOCK), slice(left, left + BLOCK)
    bits = np.bitwise_count(hashes[rows, None] ^ hashes[None, columns])
    near = bits <= MAX_HASH_DISTANCE
    if top == left:
        near = np.triu(near, 1)
    first, second = np.nonzero(near)
    if len(first) > CROWDED * near.size:
        correlations = (vectors[rows] @ vectors[columns].T)[first, second]
    else:
        correlations = np.einsum("ij,ij->i", vectors[first + top], vectors[second + left])
    like = 1 - correlations <= np.minimum(distances[first + top], distances[second + left])
    first, second, correlations = first[like], second[like], correlations[like]
    return np.stack([first + top, second + left, correlations, bits[first, second]], axis=1, dtype=np.float64)


def compute_clusters(contents: pd.DataFrame, pairs: pd.DataFrame) -> Int64[np.ndarray, " num_images"]:
    """The cluster of each content: those that a pair or a group joins, directly or through others, are in one.

    Args:
        contents: image_id and group (or none), one row a content.
        pairs: first and second, from `find_near_duplicates`.
    """
    positions = pd.Series(np.arange(len(contents)), index=contents["image_id"])
    grouped = contents["group"].dropna()
    anchors = grouped.map(grouped.drop_duplicates().reset_index().set_index("group")["index"])
    starts = np.concatenate([positions.loc[pairs["first"]].to_numpy(), grouped.index.to_numpy()])
    ends = np.concatenate([positions.loc[pairs["second"]].to_numpy(), anchors.to_numpy()]).astype(np.int64)
    links = coo_matrix((np.ones(len(starts), np.int8), (starts, ends)), shape=(len(contents),) * 2)
    clusters: np.ndarray = connected_components(links, directed=False)[1]
    return clusters.astype(np.int64)
