"""Scores of any number of images by registered models: a row an image, in parts that a stopped run goes on from."""

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from filelock import FileLock
from PIL import Image

from loupe.config import TASK_NAMES
from loupe.data.images import read_image
from loupe.data.manifest import save_table
from loupe.data.sources import READ, SUFFIXES, TABLE_READERS, list_files, name_source, read_table
from loupe.errors import ConfigError, DataError, TrackingError
from loupe.evaluation.pictures import DisplayScale, overlay_heat
from loupe.stages.entry import save_json
from loupe.stages.files import LISTING, load_data_set
from loupe.tracking.loading import find_named, load_image_model
from loupe.tracking.pyfunc import ImageModel, Options
from loupe.tracking.runs import connect

PART_SIZE = 256  # images

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What is to be scored, by whom, and what beside the plain answer is wanted.

    `model` is an alias of the present data's models, such as `champion`, or `<name>@<alias>` or `<name>/<version>` of
    one in MLflow's registry. `maps` is a folder for heat maps. Others are those of `Options`.
    """

    source: Path
    model: str
    out: Path
    threshold: float | None = None
    false_alarm_rate: float | None = None
    embeddings: bool = False
    maps: Path | None = None


@dataclass(frozen=True)
class Scorer:
    """One loaded model; `task` is classifier or detector, `version` its name and number in the registry."""

    task: str
    version: str
    model: ImageModel
    map_scale: DisplayScale | None


@dataclass(frozen=True)
class Scored:
    """What came of it: the table, and how many of its images could not be read, and are flagged as anomalous."""

    table: Path
    num_images: int
    num_unreadable: int
    num_anomalous: int | None
    versions: tuple[str, ...]


def score_and_tell(request: Request) -> None:
    """Score, and end with a line for a person."""
    scored = score_images(request)
    flagged = "" if scored.num_anomalous is None else f", {scored.num_anomalous:,} of them flagged as anomalous"
    images = "1 image" if scored.num_images == 1 else f"{scored.num_images:,} images"
    log.info("%s scored by %s%s", images, " and ".join(scored.versions), flagged)
    if scored.num_unreadable:
        log.warning("%s could not be read: the column `problem` says why", f"{scored.num_unreadable:,}")
    log.info("written: %s", scored.table)


def score_images(request: Request) -> Scored:
    """Write one row an image to `request.out`, a Parquet or CSV file, whole.

    The columns are `path` and, where the source is a table that has it, `group`; of a classifier `predicted`,
    `probability_<label>` and `classifier`, its version; of a detector `anomaly_score`, `is_anomalous`, `threshold` and
    `detector`; `embedding` where it is asked for, the detector's if there is one; and `problem`, why an image could not
    be read, null where it could.

    Raises:
        DataError: if there is nothing to score.
        ConfigError: if what is asked for does not go together.
        TrackingError: if there is no such model.
    """
    _check(request)
    root, images = list_source(request.source)
    scorers = load_scorers(request)
    request.out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(request.out.with_name(f".{request.out.name}.lock")):  # two would mix their parts
        return _score(request, root, images, scorers)


def _score(request: Request, root: Path, images: pd.DataFrame, scorers: Sequence[Scorer]) -> Scored:
    parts = _open_parts(request, root, images, scorers)
    for number, start in enumerate(range(0, len(images), PART_SIZE)):
        part = parts / f"{number:06d}.parquet"
        if not part.exists():
            save_table(_score_part(request, root, images[start : start + PART_SIZE], scorers), part)
            log.info("%d of %d images", min(start + PART_SIZE, len(images)), len(images))
    scored = _join(parts, request.out, tuple(scorer.version for scorer in scorers))
    shutil.rmtree(parts)
    return scored


def _check(request: Request) -> None:
    if request.out.suffix not in (".parquet", ".csv"):
        raise ConfigError(f"--out must end in .parquet or .csv, got {request.out}")
    if request.out.suffix == ".csv" and request.embeddings:
        raise ConfigError("embeddings are long lists, which CSV has no place for: let --out end in .parquet")
    Options(request.threshold, request.false_alarm_rate)  # which refuses what does not go together


def list_source(source: Path) -> tuple[Path, pd.DataFrame]:
    """A folder, and the `path` of each image below it: of one image, of a folder of any depth, or of a table.

    A table is a CSV or Parquet file with the column `path`, relative to the table's folder, and perhaps `group`, which
    images of one part or patient share and which is kept; what it names and is not there becomes a row with that
    problem.

    Raises:
        DataError: if there is none.
    """
    if source.is_file() and source.suffix.lower() in TABLE_READERS:
        table = read_table(source)
        if "path" not in table:
            raise DataError(f"{source} has no column `path`, but {', '.join(map(str, table.columns))}")
        table = table.loc[table["path"].notna(), [name for name in ("path", "group") if name in table]]
        root, images = source.parent, table.astype("str").where(table.notna()).reset_index(drop=True)
    elif source.is_file():
        root, images = source.parent, pd.DataFrame({"path": [source.name]})
    else:
        files, _ = list_files(source)
        paths = [path for path in files if path.lower().endswith(SUFFIXES)]
        root, images = source, pd.DataFrame({"path": paths}, dtype="str")
    if images.empty:
        raise DataError(f"{source} names no images: expected files that end in {', '.join(READ)}")
    return root, images


def load_scorers(request: Request) -> list[Scorer]:
    """The models that the request names, the classifier first.

    Raises:
        TrackingError: if there is none.
    """
    data_set = load_data_set().name if LISTING.exists() else name_source(Path.cwd())
    client = connect(data_set)
    if "@" in request.model or "/" in request.model:
        names = [request.model]
    else:
        names = [f"{data_set}-{task}@{request.model}" for task in TASK_NAMES]
    versions = [version for name in names if (version := find_named(client, name)) is not None]
    if not versions:
        raise TrackingError(f"MLflow's registry has no model {' or '.join(names)}: `loupe promote` makes champions")
    scorers = []
    for version in versions:
        model, config = load_image_model(version)
        scale = DisplayScale(**config["map_scale"]) if "map_scale" in config else None
        task = "classifier" if "classifier" in config else "detector"
        scorers.append(Scorer(task, f"{version.name}/{version.version}", model, scale))
    if request.maps is not None and all(scorer.map_scale is None for scorer in scorers):
        raise ConfigError(f"heat maps are a detector's, and {scorers[0].version} is none")
    return scorers


def _open_parts(request: Request, root: Path, images: pd.DataFrame, scorers: Sequence[Scorer]) -> Path:
    """A folder beside the table for its parts; those that an equal request left there are kept, others removed."""
    parts = request.out.with_name(f"{request.out.name}.parts")
    facts = {key: str(value) for key, value in asdict(request).items()}
    facts |= {"versions": ", ".join(scorer.version for scorer in scorers), "root": str(root.resolve())}
    stamped = images.assign(stamp=[_stamp(root / path) for path in images["path"]])
    facts["images"] = hashlib.sha256(stamped.to_csv(index=False).encode()).hexdigest()
    known = parts / "request.json"
    if parts.exists() and not (known.exists() and json.loads(known.read_text(encoding="utf-8")) == facts):
        shutil.rmtree(parts)
    save_json(facts, known)
    return parts


def _stamp(path: Path) -> str:
    """Size and time of change, by which another content under the same name is known; empty where there is none."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"


def _score_part(request: Request, root: Path, images: pd.DataFrame, scorers: Sequence[Scorer]) -> pd.DataFrame:
    paths, rows = list(images["path"]), images.reset_index(drop=True)
    contents, unread = _read_all([root / path for path in paths])
    for scorer in scorers:
        options = Options(embeddings=request.embeddings)
        if scorer.task == "detector":
            options = Options(
                request.threshold, request.false_alarm_rate, request.embeddings, maps=request.maps is not None
            )
        answers = scorer.model.answer(contents, options)
        if request.maps is not None and "anomaly_map" in answers:
            _save_maps(request.maps, paths, contents, list(answers.pop("anomaly_map")), scorer)
        rows = (
            rows.drop(columns=["problem", "embedding"], errors="ignore")
            .join(answers)
            .assign(**{scorer.task: scorer.version})
        )
    rows.loc[list(unread), "problem"] = list(unread.values())
    last = [name for name in ("problem", "embedding") if name in rows]
    return rows[[*rows.columns.drop(last), *last]]


def _read_all(paths: Sequence[Path]) -> tuple[list[bytes], dict[int, str]]:
    """The content of each file, and why some can't be read, by their place; these are empty, which no image is."""
    contents, unread = [], {}
    for row, path in enumerate(paths):
        try:
            contents.append(path.read_bytes())
        except (OSError, ValueError) as error:  # the latter of a null character
            reason = error.strerror if isinstance(error, OSError) else error
            contents.append(b"")
            unread[row] = f"the file can't be read: {reason}"
            log.warning("%s can't be read: %s", path, reason)
    return contents, unread


def _save_maps(
    folder: Path, paths: Sequence[str], contents: Sequence[bytes], maps: Sequence[np.ndarray | None], scorer: Scorer
) -> None:
    """Write each map over its image as <folder>/<path>.png; all are on the model's one display scale."""
    assert scorer.map_scale is not None
    for path, content, anomaly_map in zip(paths, contents, maps, strict=True):
        if not isinstance(anomaly_map, np.ndarray):
            continue
        image = read_image(content, scorer.model.geometry)
        picture = Image.fromarray(overlay_heat(image, scorer.map_scale.apply(anomaly_map)))
        parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]  # nothing outside the folder
        place = folder.joinpath(*parts[:-1], f"{parts[-1]}.png")
        place.parent.mkdir(parents=True, exist_ok=True)
        unfinished = place.with_suffix(".unfinished")
        picture.save(unfinished, format="PNG")
        unfinished.replace(place)


def _join(parts: Path, out: Path, versions: tuple[str, ...]) -> Scored:
    """All parts as one file, written part by part and then renamed."""
    files = sorted(parts.glob("*.parquet"))
    schema = pa.unify_schemas([pq.read_schema(file) for file in files], promote_options="permissive")
    num_images, num_unreadable, num_anomalous = 0, 0, None
    unfinished = out.with_name(f"{out.name}.unfinished")
    writer = (pyarrow.csv.CSVWriter if out.suffix == ".csv" else pq.ParquetWriter)(unfinished, schema)
    with writer:
        for file in files:
            table = pq.read_table(file, schema=schema)
            writer.write_table(table)
            num_images += table.num_rows
            num_unreadable += table.num_rows - table["problem"].null_count
            if "is_anomalous" in schema.names:
                num_anomalous = (num_anomalous or 0) + (pc.sum(table["is_anomalous"]).as_py() or 0)
    unfinished.replace(out)
    return Scored(out, num_images, num_unreadable, num_anomalous, versions)
