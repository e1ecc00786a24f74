"""The manifest: one row an image; the quality of each; and the quarantine of files that could not be used."""

import hashlib
import inspect
import os
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.fft
from jaxtyping import UInt8
from PIL import Image

from loupe.data import images
from loupe.data.images import choose_num_threads, decode_image, open_mask
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
        ("bits", pa.int8()),  # how many of 16 its values need, 8 at least; null where the file has not 16
        ("phash", pa.string()),  # 64-bit perceptual hash, hexadecimal
        ("num_bytes", pa.int64()),
    ]
)
QUALITY_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("brightness", pa.float32()),  # mean grey value of a miniature, 0 to 255
        (
            "contrast",
            pa.float32(),
        ),  # deviation of the grey values, of the middle or of the miniature if larger
        ("sharpness", pa.float32()),  # variance of the Laplacian of the middle, at most MIDDLE_SIDE pixels a side
        ("thumbnail", pa.binary()),  # grey, THUMBNAIL_SIDE x THUMBNAIL_SIDE, row by row
    ]
)
MASKS_SCHEMA = pa.schema(
    [
        ("path", pa.string()),  # of the image
        ("mask_path", pa.string()),
        ("problem", pa.string()),  # null where the mask is as it should be
    ]
)
QUARANTINE_SCHEMA = pa.schema([("path", pa.string()), ("label", pa.string()), ("reason", pa.string())])
MIDDLE_SIDE, MINIATURE_SIDE, THUMBNAIL_SIDE = 128, 32, 16
STAMP = ["path", "num_bytes", "modified_ns"]  # as long as these stay, a file's content is taken to stay
FACTS_SCHEMA = pa.schema(
    [
        *(("path", pa.string()), ("num_bytes", pa.int64()), ("modified_ns", pa.int64())),
        *(SCHEMA.field(name) for name in ("image_id", "width", "height", "mode", "bits", "phash")),
        *(QUALITY_SCHEMA.field(name) for name in ("brightness", "contrast", "sharpness", "thumbnail")),
        ("reason", pa.string()),  # why the file can't be used; null where it can
    ]
)
Look = tuple[str, int, int, str, int | None, float, float, bytes]
LOOK = ("image_id", "width", "height", "mode", "bits", "contrast", "sharpness", "miniature")
NO_LOOK: Look = ("", 0, 0, "", None, 0.0, 0.0, bytes(MINIATURE_SIDE**2))
CHUNK = 64  # files described together: numpy's and the pool's own costs are then small a file


def build_facts(root: Path, listing: Listing, known: pd.DataFrame | None = None) -> pd.DataFrame:
    """Decode each listed image once, in parallel; files that are in `known` with the same stamp are not read again.

    Args:
        root: the source folder.
        known: what an earlier call returned, if anything.

    Returns:
        Columns of FACTS_SCHEMA, one row a listed path; where `reason` is set, the file can't be used.
    """
    stamps = pd.DataFrame([_stamp(root, path) for path in listing.rows["path"].unique()], columns=STAMP)
    if known is None:
        known = FACTS_SCHEMA.empty_table().to_pandas()
    # What could not be used is tried again: a disk may have failed, or a folder been closed, for a while.
    known = stamps.merge(known[known["reason"].isna()], on=STAMP)
    new = stamps[~stamps["path"].isin(known["path"])]
    chunks = [new.iloc[start : start + CHUNK] for start in range(0, len(new), CHUNK)]
    real_root = os.path.realpath(root)
    with ThreadPoolExecutor(choose_num_threads(new["num_bytes"].tolist())) as pool:
        described = list(pool.map(lambda chunk: _describe_files(real_root, chunk), chunks))
    found = pa.Table.from_batches(described, FACTS_SCHEMA).to_pandas()
    facts: pd.DataFrame = pd.concat([known, found])
    return facts.sort_values("path", ignore_index=True)


def compute_facts_version() -> str:
    """A digest of the code that facts come from, so that facts of other code are not taken for known."""
    code = inspect.getsource(sys.modules[__name__]) + inspect.getsource(images)
    return hashlib.sha256(code.encode()).hexdigest()


def build_manifest(listing: Listing, facts: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Join what the layout says with what the files hold.

    Returns:
        The manifest (SCHEMA), the quality of each content (QUALITY_SCHEMA) and the quarantine (QUARANTINE_SCHEMA).
    """
    rows = _bring_to_one_depth(listing.rows.merge(facts, on="path"))
    usable = rows["reason"].isna()
    manifest = rows.loc[usable, SCHEMA.names].astype({"width": "int32", "height": "int32"}).reset_index(drop=True)
    quality = rows.loc[usable, QUALITY_SCHEMA.names].drop_duplicates("image_id").sort_values("image_id")
    return manifest, quality.reset_index(drop=True), rows.loc[~usable, QUARANTINE_SCHEMA.names].reset_index(drop=True)


def _bring_to_one_depth(rows: pd.DataFrame) -> pd.DataFrame:
    """A 16-bit file was looked at in its own depth, and is used in that of the deepest of all."""
    factors = (2.0 ** (rows["bits"] - rows["bits"].max())).fillna(1)
    thumbnails = [
        thumbnail if factor == 1 else (np.frombuffer(thumbnail, np.uint8) * factor).astype(np.uint8).tobytes()
        for thumbnail, factor in zip(rows["thumbnail"], factors, strict=True)
    ]
    linear = rows[["brightness", "contrast"]].mul(factors, axis=0)
    return rows.assign(**linear, sharpness=rows["sharpness"] * factors**2, thumbnail=thumbnails)


def check_masks(root: Path, manifest: pd.DataFrame) -> pd.DataFrame:
    """Decode every mask, in parallel: it must have its image's size, and something of it must be marked.

    Returns:
        Columns of MASKS_SCHEMA, one row an image with a mask.
    """
    rows = manifest.dropna(subset="mask_path")
    real_root, paths = os.path.realpath(root), [root / path for path in rows["mask_path"]]
    sizes = zip(rows["width"], rows["height"], strict=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        problems = list(pool.map(lambda path, size: _find_mask_problem(real_root, path, size), paths, sizes))
    found = pd.Series(problems, index=rows.index, dtype=object)
    return rows[["path", "mask_path"]].assign(problem=found).reset_index(drop=True)


def _find_mask_problem(real_root: str, place: Path, size: tuple[int, int]) -> str | None:
    try:
        _check_place(real_root, place)
        mask = open_mask(place)
    except OSError as error:
        return error.strerror
    except DataError as error:
        return str(error).removeprefix(f"{place} ")
    if mask.size != size:
        return f"it is {mask.width} x {mask.height}, and its image {size[0]} x {size[1]}"
    return None if mask.getbbox() else "it marks nothing"


def _stamp(root: Path, path: str) -> tuple[str, int, int]:
    try:
        status = (root / path).stat()
    except (OSError, ValueError):  # the latter of a null character
        return path, -1, -1
    return path, status.st_size, status.st_mtime_ns


def _describe_files(real_root: str, stamps: pd.DataFrame) -> pa.RecordBatch:
    """Facts of some files; what follows from their miniatures is computed for all of them at once."""
    looks, reasons = zip(*[_try_to_look(real_root, path) for path in stamps["path"]], strict=True)
    found: dict[str, Any] = dict(zip(LOOK, zip(*looks, strict=True), strict=True))
    miniatures = np.frombuffer(b"".join(found.pop("miniature")), np.uint8).reshape(-1, MINIATURE_SIDE, MINIATURE_SIDE)
    found["phash"] = compute_perceptual_hashes(miniatures)
    found["brightness"] = miniatures.mean(axis=(1, 2))
    found["contrast"] = np.maximum(miniatures.std(axis=(1, 2)), found["contrast"])
    found["thumbnail"] = _shrink(miniatures)
    unusable = np.array([reason is not None for reason in reasons])
    columns = {name: pa.array(values, FACTS_SCHEMA.field(name).type, mask=unusable) for name, values in found.items()}
    columns |= {name: pa.array(stamps[name]) for name in STAMP} | {"reason": pa.array(reasons, pa.string())}
    return pa.record_batch([columns[name] for name in FACTS_SCHEMA.names], schema=FACTS_SCHEMA)


def _try_to_look(real_root: str, path: str) -> tuple[Look, str | None]:
    """A look at a file, or nothing and the reason why it can't be used."""
    try:
        return _look_at(real_root, path), None
    except OSError as error:
        return NO_LOOK, error.strerror
    except DataError as error:
        return NO_LOOK, str(error).removeprefix("the image ")


def _look_at(real_root: str, path: str) -> Look:
    """Contrast and sharpness are of the middle; the grey miniature is of the whole, MINIATURE_SIDE pixels square."""
    place = Path(real_root, path)
    _check_place(real_root, place)
    content = place.read_bytes()
    image, mode, bits = decode_image(content, grey=True)
    left, top = max(0, image.width - MIDDLE_SIDE) // 2, max(0, image.height - MIDDLE_SIDE) // 2
    middle = image.crop((left, top, min(image.width, left + MIDDLE_SIDE), min(image.height, top + MIDDLE_SIDE)))
    values = np.asarray(middle)
    contrast, sharpness = (cv2.meanStdDev(one)[1][0, 0] for one in (values, cv2.Laplacian(values, cv2.CV_16S)))
    miniature = image.resize((MINIATURE_SIDE, MINIATURE_SIDE), Image.Resampling.BOX, reducing_gap=1.0)
    digest = hashlib.sha256(content).hexdigest()
    return digest, *image.size, mode, bits, float(contrast), float(sharpness**2), miniature.tobytes()


def _check_place(real_root: str, place: Path) -> None:
    """Raises DataError for what leads out of the source folder, or is no regular file."""
    real = os.path.realpath(place)
    is_link = place.is_symlink()
    try:
        kind = place.stat().st_mode
    except (FileNotFoundError, ValueError) as error:  # the latter of a null character
        raise DataError("is a link to nothing" if is_link else "does not exist") from error
    if not real.startswith(f"{real_root}{os.sep}"):
        raise DataError("is a link that leaves the folder" if is_link else "is outside of the folder")
    if stat.S_ISDIR(kind):
        raise DataError("is a link to a folder, and not followed" if is_link else "is a folder")
    if not stat.S_ISREG(kind):
        raise DataError("is no regular file")


def _shrink(miniatures: UInt8[np.ndarray, "num_images side side"]) -> list[bytes]:
    """Thumbnails, as bytes row by row: means of blocks of the miniatures."""
    factor = MINIATURE_SIDE // THUMBNAIL_SIDE
    blocks = miniatures.reshape(-1, THUMBNAIL_SIDE, factor, THUMBNAIL_SIDE, factor)
    means = blocks.mean(axis=(2, 4), dtype=np.float32).round().astype(np.uint8)
    return [thumbnail.tobytes() for thumbnail in means]


def compute_perceptual_hashes(miniatures: UInt8[np.ndarray, "num_images side side"]) -> list[str]:
    """64 bits an image, hexadecimal: which low frequencies of its cosine transform are above their median.

    After Zauner, "Implementation and benchmarking of perceptual image hash functions", 2010, sec. 3.2.
    """
    low = scipy.fft.dctn(miniatures.astype(np.float32), axes=(1, 2))[:, :8, :8].reshape(-1, 64)
    bits = low > np.median(low, axis=1, keepdims=True)
    return [row.tobytes().hex() for row in np.packbits(bits, axis=1)]


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
