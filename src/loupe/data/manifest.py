"""The manifest: one row an image, and the quarantine of files that could not be read."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagehash
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from loupe.data.images import open_image, read_mode
from loupe.data.sources import Listing
from loupe.errors import DataError

SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),  # sha256 of the file's bytes
        ("path", pa.string()),  # relative to the source folder, posix
        ("label", pa.string()),
        ("group", pa.string()),
        ("given_split", pa.string()),
        ("mask_path", pa.string()),
        ("width", pa.int32()),  # pixels, after EXIF rotation
        ("height", pa.int32()),
        ("mode", pa.string()),  # Pillow's name of the file's pixel format
        ("phash", pa.string()),  # 64-bit perceptual hash, hexadecimal
        ("num_bytes", pa.int64()),
    ]
)
QUARANTINE_SCHEMA = pa.schema([("path", pa.string()), ("label", pa.string()), ("reason", pa.string())])
PHASH_SIDE = 64


def build_manifest(root: Path, listing: Listing) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Decode every listed image once, in parallel.

    Returns:
        The manifest (columns of SCHEMA) and the quarantine (path, label, reason), both sorted by path.
    """
    with ThreadPoolExecutor() as pool:
        described = list(pool.map(lambda path: _describe_file(root / path), listing.rows["path"], chunksize=64))
    facts = pd.DataFrame(described, columns=["image_id", "width", "height", "mode", "phash", "num_bytes", "reason"])
    rows = pd.concat([listing.rows.reset_index(drop=True), facts], axis=1)
    readable = rows["reason"].isna()
    manifest = rows.loc[readable, SCHEMA.names].reset_index(drop=True)
    return manifest, rows.loc[~readable, QUARANTINE_SCHEMA.names].reset_index(drop=True)


def _describe_file(path: Path) -> tuple[str | int | None, ...]:
    try:
        content = path.read_bytes()
        image = open_image(content)
    except (OSError, DataError) as error:
        reason = str(error).removeprefix("the image ")
        return (None, None, None, None, None, None, reason)
    thumbnail = image.convert("L")
    thumbnail.thumbnail((PHASH_SIDE, PHASH_SIDE))
    digest = hashlib.sha256(content).hexdigest()
    return (digest, image.width, image.height, read_mode(content), str(imagehash.phash(thumbnail)), len(content), None)


def save_table(table: pd.DataFrame, path: Path, schema: pa.Schema | None = None) -> None:
    """Write a Parquet file whole: a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    pq.write_table(pa.Table.from_pandas(table, schema=schema, preserve_index=False), unfinished)
    unfinished.replace(path)


def load_table(path: Path) -> pd.DataFrame:
    """Read a Parquet file that a stage wrote.

    Raises:
        DataError: if the file is missing.
    """
    if not path.exists():
        raise DataError(f"{path} is missing: run the stage that writes it, or `dvc repro`")
    return pd.read_parquet(path)


def compute_data_digest(rows: pd.DataFrame) -> str:
    """sha256 over the sorted (image_id, label, split) triples: what a model was trained and tested on."""
    triples = rows[["image_id", "label", "split"]].sort_values(["image_id", "label", "split"])
    return hashlib.sha256("\n".join(" ".join(row) for row in triples.itertuples(index=False)).encode()).hexdigest()
