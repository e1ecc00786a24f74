"""Near-duplicates: pairs of images that an eye takes for the same picture, and the clusters that they make."""

import numpy as np
import pandas as pd
from jaxtyping import Float, Int64, UInt8
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from loupe.data.manifest import THUMBNAIL_SIDE

# Between photos of one tile at other exposures, and between different clothes of one cut, these two together part best:
# a perceptual hash alone takes all trousers for one picture, thumbnails alone take all plain surfaces for one.
MIN_CORRELATION = 0.98
MAX_HASH_DISTANCE = 8  # bits of 64
MIN_DEVIATION = 2.0  # grey values; a flatter thumbnail is noise
BLOCK = 4096


def find_near_duplicates(contents: pd.DataFrame) -> pd.DataFrame:
    """All pairs of contents whose thumbnails correlate and whose perceptual hashes are near.

    The search is exact, by blocks of a matrix product: time grows with the square of the number of images (about ten
    seconds for 40,000 on two cores), memory does not.

    Args:
        contents: image_id, phash and thumbnail, one row a content.

    Returns:
        first, second (image_ids, first < second), correlation in [-1, 1] and hash_distance in bits; sorted.
    """
    rows = contents.sort_values("image_id")
    pixels = np.frombuffer(b"".join(rows["thumbnail"]), np.uint8).reshape(len(rows), THUMBNAIL_SIDE**2)
    telling = pixels.std(axis=1) >= MIN_DEVIATION
    rows, vectors = rows[telling], _normalise(pixels[telling])
    hashes = _unpack_hashes(rows)
    found = [
        _compare_blocks(vectors, hashes, top, left)
        for top in range(0, len(rows), BLOCK)
        for left in range(top, len(rows), BLOCK)
    ]
    pairs = np.concatenate(found) if found else np.empty((0, 4))
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


def _normalise(pixels: UInt8[np.ndarray, "num_images num_pixels"]) -> Float[np.ndarray, "num_images num_pixels"]:
    """Thumbnails with mean 0 and length 1, so that a product is a correlation."""
    centred = pixels.astype(np.float32)
    centred -= centred.mean(axis=1, keepdims=True)
    centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6)
    return centred


def _unpack_hashes(rows: pd.DataFrame) -> UInt8[np.ndarray, "num_images 8"]:
    return np.frombuffer(bytes.fromhex("".join(rows["phash"])), np.uint8).reshape(len(rows), 8)


def _compare_blocks(
    vectors: Float[np.ndarray, "num_images num_pixels"], hashes: UInt8[np.ndarray, "num_images 8"], top: int, left: int
) -> Float[np.ndarray, "num_pairs 4"]:
    """Pairs between two blocks of images: their positions, correlation and hash distance."""
    correlations = vectors[top : top + BLOCK] @ vectors[left : left + BLOCK].T
    first, second = np.nonzero(correlations >= MIN_CORRELATION)
    keep = first + top < second + left
    first, second = first[keep], second[keep]
    distances = np.unpackbits(hashes[first + top] ^ hashes[second + left], axis=1).sum(axis=1)
    near = distances <= MAX_HASH_DISTANCE
    columns = (first + top, second + left, correlations[first, second], distances)
    return np.stack([column[near].astype(np.float64) for column in columns], axis=1)


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
