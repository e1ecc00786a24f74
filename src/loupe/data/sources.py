"""Finding images in a folder: which layout it has, and what the layout says of each image."""

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from loupe.errors import DataError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"})
SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
NORMAL_FOLDER = "good"
NAMELESS = frozenset({"images", "data", "dataset"})
LAYOUTS = {
    "class_folders": "a folder for each class, with its images",
    "split_folders": "train/, test/ and perhaps val/, each with a folder for each class",
    "mvtec": "train/good/, test/<defect>/ and perhaps ground_truth/<defect>/ (the MVTec AD layout)",
}


@dataclass(frozen=True)
class Listing:
    """Images found in a folder. `rows` has path (relative, posix), label, group, given_split and mask_path."""

    layout: str
    rows: pd.DataFrame


def list_images(root: Path, layout: str = "auto") -> Listing:
    """List the images under `root`, in an order that does not depend on the file system.

    Raises:
        DataError: if the folder is missing, unreadable, empty, or of no known layout.
    """
    files = _list_files(root)
    layout = _recognise_layout(root, files) if layout == "auto" else layout
    label_depth = 0 if layout == "class_folders" else 1
    rows = [_describe(path, label_depth) for path in files if len(path.parts) > label_depth + 1]
    rows = [row for row in rows if label_depth == 0 or row["given_split"]]
    if not rows:
        raise DataError(f"{root} has no images in the layout {layout} ({LAYOUTS[layout]})")
    table = pd.DataFrame(rows, columns=["path", "label", "group", "given_split", "mask_path"], dtype="str")
    if layout == "mvtec":
        table["mask_path"] = _find_masks(table["path"], {str(path) for path in files}).to_numpy()
    return Listing(layout, table)


def name_source(root: Path) -> str:
    """A name for the data set, for runs and models: the folder's, or its parent's where it says nothing."""
    folder = root.resolve()
    while folder.name.lower() in NAMELESS:
        folder = folder.parent
    return re.sub(r"[^A-Za-z0-9_-]+", "_", folder.name).strip("_") or "images"


def _list_files(root: Path) -> list[Path]:
    """Paths, relative to `root`, of the files with an image's suffix; hidden ones are left out."""
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

    found = [
        (Path(folder) / name).relative_to(root)
        for folder, _, names in os.walk(root, onerror=fail)
        for name in names
        if Path(name).suffix.lower() in SUFFIXES
    ]
    images = sorted(path for path in found if not any(part.startswith(".") for part in path.parts))
    if not images:
        raise DataError(f"{root} holds no images: expected files that end in {', '.join(sorted(SUFFIXES))}")
    return images


def _recognise_layout(root: Path, files: list[Path]) -> str:
    """MVTec before split folders before class folders, as each is a special case of the next."""
    folders = {path.parts[0] for path in files if len(path.parts) > 1}
    in_train = {path.parts[1] for path in files if len(path.parts) > 2 and path.parts[0] == "train"}
    if in_train == {NORMAL_FOLDER} and "test" in folders:
        return "mvtec"
    if in_train and folders <= set(SPLIT_FOLDERS):
        return "split_folders"
    if folders and not folders & set(SPLIT_FOLDERS):
        return "class_folders"
    known = "; ".join(f"{name}: {meaning}" for name, meaning in LAYOUTS.items())
    seen = f"the folders {', '.join(sorted(folders))}" if folders else f"{len(files)} images in no folder"
    raise DataError(f"{root} has none of the known layouts. Expected {known}. Found {seen}")


def _describe(path: Path, label_depth: int) -> dict[str, str | None]:
    given_split = SPLIT_FOLDERS.get(path.parts[0]) if label_depth else None
    return {
        "path": path.as_posix(),
        "label": path.parts[label_depth],
        "group": None,
        "given_split": given_split,
        "mask_path": None,
    }


def _find_masks(paths: pd.Series, files: set[str]) -> pd.Series:
    """The mask of test/<defect>/<stem>.* is ground_truth/<defect>/<stem>_mask.png or <stem>.png, where there is one."""

    def find(path: str) -> str | None:
        _, defect, *_, name = path.split("/")
        stem = f"ground_truth/{defect}/{Path(name).stem}"
        return next((mask for mask in (f"{stem}_mask.png", f"{stem}.png") if mask in files), None)

    return paths.map(find).astype("str")
