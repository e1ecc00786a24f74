"""What both trainings record: parameters, data, contact sheet and model in MLflow; history and run for DVC."""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from loupe.config import Params
from loupe.data.manifest import compute_data_digest, load_table, save_table
from loupe.models.files import LAST
from loupe.stages.entry import save_json
from loupe.stages.files import (
    AUGMENT,
    CONTACT_SHEET,
    DATA_REPORT,
    HISTORY,
    MANIFEST,
    MODELS,
    POLICY,
    PREPARED,
    RUN,
    SEEN,
    SPLITS,
    TRAINING_MEMORY,
    VALIDATION,
    WORST_IMAGES,
    DataSet,
    load_data_set,
)
from loupe.tracking.logged_models import log_model
from loupe.tracking.runs import (
    connect,
    end_dead_runs,
    find_run,
    log_dataset,
    log_results,
    log_stage_times,
    start_run,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

NUM_EXAMPLES = 2  # one alone could freeze a batch size of one into a model


@contextmanager
def record_training(task: str, params: Params, recipe: "DataclassInstance") -> Iterator[str]:
    """An MLflow run around one training of `task`; gives its id. `recipe` says what `auto` became.

    When it ends well, the metric `<task>/train/seconds` says how long it took, recording and all.
    """
    data_set, start = load_data_set(), time.monotonic()
    client = connect(data_set.name)
    (MODELS / task).mkdir(parents=True, exist_ok=True)
    rows = load_table(MANIFEST).drop_duplicates("image_id").merge(load_table(SPLITS), on="image_id")
    values = {**params.model_dump(by_alias=True), "chosen": asdict(recipe)}
    with start_run(task, values, {"task": task}) as run_id:
        end_dead_runs(client, client.get_run(run_id).info.experiment_id)
        log_dataset(rows, Path(data_set.source), data_set.name, compute_data_digest(rows))
        augmented = [AUGMENT / task / CONTACT_SHEET, AUGMENT / task / POLICY]
        log_results(client, run_id, files=[*augmented, VALIDATION, WORST_IMAGES, DATA_REPORT])
        yield run_id
        log_results(client, run_id, metrics={f"{task}/train/seconds": time.monotonic() - start})


def record_stage_times(times: Mapping[str, Mapping[str, Any]]) -> None:
    """Add to the run of each trained model how long the stages took that led to it.

    Args:
        times: `seconds` and `unchanged` by stage.

    Raises:
        TrackingError: if the store does not hold such a run.
    """
    client = connect(load_data_set().name)
    for run_file in sorted(MODELS.glob(f"*/{RUN}")):
        task = run_file.parent.name
        log_stage_times(client, find_run(client, run_file), task, times)


@contextmanager
def open_memory(task: str, facts: Mapping[str, Any]) -> Iterator[Path]:
    """A folder for what a training keeps while it runs, so that one that was stopped goes on.

    It belongs to these facts, the prepared images and the policy: where any of them differs, it is another and new one,
    and the old is removed. When the training ends well, its last weights go to the model's folder.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for path in (PREPARED / task / "index.parquet", PREPARED / task / "geometry.json", AUGMENT / task / POLICY):
        digest.update(path.read_bytes())
    memory = TRAINING_MEMORY / task / digest.hexdigest()[:16]
    for old in (TRAINING_MEMORY / task).glob("*"):
        if old != memory:
            shutil.rmtree(old)
    memory.mkdir(parents=True, exist_ok=True)
    yield memory
    (memory / LAST).replace(MODELS / task / LAST)
    shutil.rmtree(memory)


def finish_recording(task: str, run_id: str, history: pd.DataFrame) -> None:
    """Write history.csv and seen.parquet, log the model to the active run, and write run.json beside the model."""
    folder = MODELS / task
    index = load_table(PREPARED / task / "index.parquet")
    save_table(index.loc[index["split"].ne("test"), ["image_id"]].reset_index(drop=True), folder / SEEN)
    history.to_csv(folder / HISTORY, index=False)
    model_uri = log_model(folder, _choose_examples(task, load_data_set()))
    save_json({"run_id": run_id, "model_uri": model_uri}, folder / RUN)


def record_results(task: str, metrics: Mapping[str, Any], path: Path, folder: Path, files: Sequence[Path]) -> None:
    """Write the figures of what was trained to `path`, and log them to its run, with files.

    Its run.json is copied to the results' folder, so that they are known to be of this training and no other.
    """
    save_json(metrics, path)
    client = connect(load_data_set().name)
    log_results(client, find_run(client, MODELS / task / RUN), metrics=metrics, files=files)
    shutil.copyfile(MODELS / task / RUN, folder / RUN)


def _choose_examples(task: str, data_set: DataSet) -> list[Path]:
    index = load_table(PREPARED / task / "index.parquet")
    paths = index.loc[index["split"].eq("train"), "path"].head(NUM_EXAMPLES)
    return [Path(data_set.source) / path for path in paths]


def load_policy(task: str) -> list[dict[str, Any]]:
    """The transforms that the augment stage wrote."""
    values: Mapping[str, Any] = json.loads((AUGMENT / task / POLICY).read_text(encoding="utf-8"))
    transforms: list[dict[str, Any]] = values["transforms"]
    return transforms
