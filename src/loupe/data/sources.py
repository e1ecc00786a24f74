"""Finding images in a folder: which layout it has, and what the layout says of each image."""

import os
import re
import stat
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from loupe.errors import DataError

READ = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".webp", ".tif", ".tiff")
UNREAD = (".gif", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".pbm", ".pgm", ".ppm")  # to be set aside, and named
SUFFIXES = READ + UNREAD
SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
SPLIT_FOLDERS |= {"training": "train", "testing": "test"}  # all of them in capitals too
NORMAL_FOLDER, MASK_FOLDER = "good", "ground_truth"
NAMELESS = frozenset({"images", "data", "dataset"})
LAYOUTS = {
    "class_folders": "a folder for each class, with its images",
    "split_folders": "train/, test/ and perhaps val/, each with a folder for each class",
    "mvtec": "train/good/, test/<defect>/ and perhaps ground_truth/<defect>/ (the MVTec AD layout)",
    "unlabelled": "images without labels, which can be scored but not trained on",
    "table": "one .csv or .parquet file beside the images, with the columns path, label and perhaps split, group, mask",
}
COLUMNS = ["path", "label", "group", "given_split", "mask_path"]
SEPARATORS = ",;\t"  # the one of which the first line has the most


def _read_csv(path: Path) -> pd.DataFrame:
    """All values are text, 007 and NA too, without the spaces around them."""
    with path.open(encoding="utf-8-sig") as file:
        separator = max(SEPARATORS, key=file.readline().count)
    options: dict[str, Any] = {"dtype": str, "keep_default_na": False, "na_values": [""], "skipinitialspace": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # it would drop what a row has too much
        table = pd.read_csv(path, sep=separator, index_col=False, **options)
    stripped: pd.DataFrame = table.apply(lambda column: column.str.strip())
    return stripped


TABLE_READERS: dict[str, Callable[[Path], pd.DataFrame]] = {".csv": _read_csv, ".parquet": pd.read_parquet}


@dataclass(frozen=True)
class Listing:
    """Images found in a folder. `rows` has COLUMNS; paths are relative to the folder, posix.

    `left_out` are the images that the layout has no place for, such as those beside the folders of classes, and the
    tables beside the images that say nothing of them.
    """

    layout: str
    rows: pd.DataFrame
    left_out: list[str]


def list_images(root: Path, layout: str = "auto") -> Listing:
    """List the images under `root`, in an order that does not depend on the file system.

    Raises:
        DataError: if the folder is missing, unreadable, empty, or of no known layout.
    """
    files, links = list_files(root)
    images = [path for path in files if path.lower().endswith(SUFFIXES)]
    if not images:
        raise DataError(f"{root} holds no images: expected files that end in {', '.join(READ)}")
    tables = [path for path in files if "/" not in path and path.lower().endswith(tuple(TABLE_READERS))]
    layout = _recognise_layout(root, images, tables) if layout == "auto" else layout
    rows = _list_table(root, tables) if layout == "table" else _read_folders(images, links, layout)
    if rows.empty:
        raise DataError(f"{root} has no images in the layout {layout} ({LAYOUTS[layout]})")
    placed = set(rows["path"]) | set(rows["mask_path"].dropna())
    misplaced = [path for path in images if path not in placed]
    left_out = misplaced if layout == "table" else [*tables, *misplaced]
    return Listing(layout, rows.sort_values("path", ignore_index=True), left_out)


def name_source(root: Path) -> str:
    """A name for the data set, for runs and models: the folder's, or its parent's where it says nothing."""
    folder = root.resolve()
    while folder.name.lower() in NAMELESS:
        folder = folder.parent
    return re.sub(r"[^A-Za-z0-9_-]+", "_", folder.name).strip("_") or "images"


def list_files(root: Path) -> tuple[list[str], list[str]]:
    """Sorted posix paths of files, and of links to folders, relative to `root`; hidden ones are left out.

    Raises:
        DataError: if the folder is missing, or not a folder that can be read.
    """
    try:
        is_folder = stat.S_ISDIR(root.stat().st_mode)
    except FileNotFoundError as error:
        raise DataError(f"{root} does not exist: expected a folder of images") from error
    except OSError as error:
        raise DataError(f"{root} can't be read ({error.strerror}): expected a folder of images") from error
    if not is_folder:
        raise DataError(f"{root} is a file: expected a folder of images")

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename} can't be read ({error.strerror}): make the folder readable") from error

    files, links = [], []
    for folder, folders, names in os.walk(root, onerror=fail):
        place = Path(folder).relative_to(root).as_posix()
        prefix = "" if place == "." else f"{place}/"
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [_spell(f"{prefix}{name}") for name in names if not name.startswith(".")]
        links += [f"{prefix}{name}" for name in folders if Path(folder, name).is_symlink()]
    return sorted(files), sorted(links)


def _spell(path: str) -> str:
    """A path that is no Unicode, spelt out: no such file is found, and so it is set aside."""
    return path.encode(errors="backslashreplace").decode()


def _recognise_layout(root: Path, images: list[str], tables: list[str]) -> str:
    """A table before folders; MVTec before split folders before class folders, each a special case of the next."""
    if any(_has_columns(root / table) for table in tables):
        return "table"
    places = {tuple(path.split("/")[:-1]) for path in images}
    folders = {parts[0] for parts in places if parts}
    splits = {folder for folder in folders if _find_split(folder)}
    in_train = {parts[1] for parts in places if len(parts) > 1 and _find_split(parts[0]) == "train"}
    if "test" in folders and (in_train == {NORMAL_FOLDER} or (NORMAL_FOLDER in in_train and MASK_FOLDER in folders)):
        return "mvtec"
    if in_train and folders == splits:
        return "split_folders"
    if folders and not splits:
        return "class_folders"
    if not folders:
        return "unlabelled"
    known = "; ".join(f"{name}: {meaning}" for name, meaning in LAYOUTS.items())
    seen = ", ".join(sorted(folders))
    raise DataError(f"{root} has none of the known layouts. Expected {known}. Found the folders {seen}")


def _find_split(name: str) -> str | None:
    return SPLIT_FOLDERS.get(name.lower())


def _has_columns(path: Path) -> bool:
    try:
        return {"path", "label"} <= set(read_table(path).columns)
    except DataError:  # some other table, beside folders of images
        return False


def read_table(path: Path) -> pd.DataFrame:
    """A CSV or Parquet file; names of columns in small letters, and of CSV all values as text.

    Raises:
        DataError: if it can't be read, or two columns have one name.
    """
    try:
        table = TABLE_READERS[path.suffix.lower()](path)
    except (OSError, ValueError, pd.errors.ParserWarning) as error:  # pandas' and pyarrow's errors are ValueErrors
        raise DataError(f"{path} can't be read as a table: {' '.join(str(error).split())}") from error
    table.columns = [str(name).strip().lower() for name in table.columns]
    if not table.columns.is_unique:
        raise DataError(f"{path} has more than one column {table.columns[table.columns.duplicated()][0]!r}")
    return table


def _list_table(root: Path, tables: list[str]) -> pd.DataFrame:
    """Rows of the one table beside the images that has the columns; of the one at all, to say what it lacks."""
    tables = [table for table in tables if _has_columns(root / table)] or tables
    if len(tables) != 1:
        raise DataError(f"{root} must hold one .csv or .parquet table beside its images, got {len(tables)}")
    table = read_table(root / tables[0])
    missing = {"path", "label"} - set(table.columns)
    if missing:
        raise DataError(f"{root / tables[0]} must have the columns path and label; {', '.join(missing)} is missing")
    rows = pd.DataFrame({"path": table["path"], "label": table["label"]}, dtype="str")
    for column, source in (("group", "group"), ("given_split", "split"), ("mask_path", "mask")):
        rows[column] = table[source].astype("str").where(table[source].notna()) if source in table else None
    unknown = {name for name in rows["given_split"].dropna() if not _find_split(name)}
    if unknown:
        raise DataError(f"{root / tables[0]}: split must be one of {', '.join(SPLIT_FOLDERS)}, got {min(unknown)!r}")
    if rows[["path", "label"]].isna().any(axis=None):
        raise DataError(f"{root / tables[0]}: every row must have a path and a label")
    twice = rows["path"][rows["path"].duplicated()]
    if len(twice):
        raise DataError(f"{root / tables[0]} must have one row an image, got {twice.iloc[0]} more than once")
    rows["given_split"] = rows["given_split"].map(_find_split, na_action="ignore")
    return rows[COLUMNS].astype("str")


def _read_folders(images: list[str], links: list[str], layout: str) -> pd.DataFrame:
    """Links to folders are rows too: they are not followed, and ingest sets them aside with that reason.

    Raises:
        DataError: if such a link is in the place of a whole class or split, or the layout does not hold.
    """
    if layout == "unlabelled":
        return pd.DataFrame({"path": [*images, *links]}, columns=COLUMNS, dtype="str")
    label_depth = 0 if layout == "class_folders" else 1
    whole = [path for path in links if path.count("/") <= label_depth]
    if whole:
        raise DataError(f"{_name_some(whole)}: a link to a folder is not followed; put the folder there, or nothing")
    placed = [path for path in images if path.count("/") > label_depth]
    placed += links
    parts = [path.split("/", label_depth + 1) for path in placed]
    table = pd.DataFrame({"path": placed, "label": [part[label_depth] for part in parts]}, columns=COLUMNS, dtype="str")
    if label_depth:
        table["given_split"] = pd.Series([_find_split(part[0]) for part in parts], dtype="str")
        table = table[table["given_split"].notna()]
    if layout == "mvtec":
        table["mask_path"] = _find_masks(table["path"], set(images)).to_numpy()
        _check_mvtec(table, images)
    return table


def _check_mvtec(table: pd.DataFrame, images: list[str]) -> None:
    """In this layout a detector is trained on all of train/, and each mask is of an image."""
    anomalous = table["path"][table["given_split"].eq("train") & table["label"].ne(NORMAL_FOLDER)]
    if len(anomalous):
        raise DataError(
            f"train/ must hold normal images alone, in train/{NORMAL_FOLDER}/, got {_name_some(anomalous)}: move what "
            "is anomalous to test/"
        )
    masks = set(images) - set(table["path"]) - set(table["mask_path"].dropna())
    of_normal = f"{MASK_FOLDER}/{NORMAL_FOLDER}/"  # they mark nothing
    alone = sorted(path for path in masks if path.startswith(f"{MASK_FOLDER}/") and not path.startswith(of_normal))
    if alone:
        raise DataError(
            f"masks without their images: {_name_some(alone)}; expected the image of "
            f"{MASK_FOLDER}/<defect>/<name>_mask.* in test/<defect>/<name>.*"
        )


def _name_some(paths: Sequence[str] | pd.Series) -> str:
    """The first of them, and how many more there are."""
    return f"{next(iter(paths))}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def _find_masks(paths: pd.Series, files: set[str]) -> pd.Series:
    """The mask of test/<defect>/<name>.* is ground_truth/<defect>/<name>_mask.* or <name>.*, where there is one."""
    masks = {mask.rpartition(".")[0]: mask for mask in sorted(files) if mask.startswith(f"{MASK_FOLDER}/")}

    def find(path: str) -> str | None:
        split, _, rest = path.rpartition(".")[0].partition("/")
        if split != "test" or rest.startswith(f"{NORMAL_FOLDER}/"):
            return None
        return masks.get(f"{MASK_FOLDER}/{rest}_mask", masks.get(f"{MASK_FOLDER}/{rest}"))

    return paths.map(find).astype("str")
