"""Reading MLflow's record: trainings, their figures, and what became of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from loupe.config import PIXEL_DETECTORS, TASK_NAMES
from loupe.errors import TrackingError
from loupe.tracking.runs import ENVIRONMENT, FAILURE_TAG, PATCH, end_dead_runs, name_store

SHORT = 8  # characters of an id, as it is shown
TASK_TAG, REPRODUCES_TAG, DATA_TAG = "task", "reproduces", "data_digest"
CARD = "model_card.md"
LONGEST_DESCRIPTION = 5000  # characters of a version's, in MLflow's tables
HEXADECIMAL = set("0123456789abcdef")


@dataclass(frozen=True)
class Record:
    """A training as MLflow has it; `version` and `aliases` are of the registry, None and empty where it has none.

    `status` is FINISHED, FAILED, KILLED or RUNNING, `failure` the sentence of one that did not end well.
    """

    run_id: str
    task: str
    experiment: str
    start: datetime
    status: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    version: str | None = None
    aliases: Sequence[str] = field(default_factory=tuple)

    @property
    def failure(self) -> str:
        """Empty where it ended well, or goes on."""
        return self.tags.get(FAILURE_TAG, "")

    @property
    def commit(self) -> str | None:
        """None where it was not trained in a repository of git."""
        return self.tags.get("git_commit")

    @property
    def is_clean(self) -> bool:
        """Whether all of its code and params were in the commit."""
        return self.tags.get("git_tree") == "clean"

    @property
    def model(self) -> str:
        """A classifier's recipe and backbone, or the detector's name and, where it has one, its backbone."""
        section = f"train_{self.task}"
        known = [self.params.get(f"{section}.{key}", "") for key in ("recipe", "model", "backbone")]
        if self.params.get(f"{section}.model") in PIXEL_DETECTORS:
            known.pop()  # it has no backbone
        return " ".join(filter(None, known))

    @property
    def figures(self) -> dict[str, float]:
        """What the test wrote by name, without times and what is of the export: the same if it is made again."""
        return {
            name: value
            for name, value in sorted(self.metrics.items())
            if name.startswith(f"{self.task}/") and not name.endswith("/seconds") and "/export/" not in name
        }


def list_records(client: MlflowClient, experiment: str, task: str | None = None, most: int = 20) -> list[Record]:
    """The trainings of an experiment, the newest first; runs whose process was killed are ended before.

    Raises:
        TrackingError: if the store has no such experiment.
    """
    known = client.get_experiment_by_name(experiment)
    if known is None:
        names = sorted(one.name for one in client.search_experiments())
        raise TrackingError(f"MLflow has no experiment {experiment!r}; it has {', '.join(names)}")
    end_dead_runs(client, known.experiment_id)
    runs = [
        run
        for one in (TASK_NAMES if task is None else (task,))
        for run in client.search_runs(
            [known.experiment_id],
            f"tags.{TASK_TAG} = '{one}'",
            max_results=most,
            order_by=["attributes.start_time DESC"],
        )
    ]
    runs.sort(key=lambda run: run.info.start_time, reverse=True)
    versions = _list_versions(client, experiment)
    return [_build_record(run, experiment, versions) for run in runs[:most]]


def find_record(client: MlflowClient, run_id: str) -> Record:
    """The training of an id, or of the beginning of one.

    Raises:
        TrackingError: if the store has none, or several.
    """
    run_id = run_id.lower()
    if not run_id or not set(run_id) <= HEXADECIMAL:
        raise TrackingError(f"a run is named by its id or the beginning of it, got {run_id!r}: `loupe runs` shows them")
    experiments = {one.experiment_id: one.name for one in client.search_experiments()}
    known = client.search_runs(list(experiments), f"attributes.run_id LIKE '{run_id}%'")
    runs = [run for run in known if run.data.tags.get(TASK_TAG) in TASK_NAMES]
    if not runs:
        raise TrackingError(f"{name_store()} holds no training {run_id}: `loupe runs` shows them")
    if len(runs) > 1:
        names = ", ".join(sorted(run.info.run_id[: len(run_id) + 4] for run in runs)[:5])
        raise TrackingError(f"several runs begin with {run_id}: {names}: give more of its id")
    experiment = experiments[runs[0].info.experiment_id]
    return _build_record(runs[0], experiment, _list_versions(client, experiment))


def _list_versions(client: MlflowClient, experiment: str) -> dict[str, tuple[str, list[str]]]:
    """Number and aliases of the version of a run, by its id. Models are named after experiment and task."""
    found: dict[str, tuple[str, list[str]]] = {}
    for task in TASK_NAMES:
        versions = client.search_model_versions(f"name='{experiment}-{task}'")
        aliases = client.get_registered_model(f"{experiment}-{task}").aliases if versions else {}
        for version in versions:
            own = sorted(alias for alias, number in aliases.items() if str(number) == str(version.version))
            found[str(version.run_id)] = (str(version.version), own)
    return found


def _build_record(run: Run, experiment: str, versions: Mapping[str, tuple[str, list[str]]]) -> Record:
    version, aliases = versions.get(run.info.run_id, (None, []))
    return Record(
        run_id=run.info.run_id,
        task=run.data.tags[TASK_TAG],
        experiment=experiment,
        start=datetime.fromtimestamp(run.info.start_time / 1000, UTC),
        status=run.info.status,
        params=run.data.params,
        metrics=run.data.metrics,
        tags=run.data.tags,
        version=version,
        aliases=tuple(aliases),
    )


def load_environment(record: Record) -> dict[str, Any]:
    """Versions and device as `describe_environment` gives them; empty where the run has none."""
    text = _load_text(record, ENVIRONMENT)
    return {} if text is None else json.loads(text)


def load_patch(record: Record) -> str | None:
    """What was not committed; None where the run has no patch."""
    return _load_text(record, PATCH)


def _load_text(record: Record, name: str) -> str | None:
    try:
        path = mlflow.artifacts.download_artifacts(run_id=record.run_id, artifact_path=name)
    except (MlflowException, OSError):
        return None
    return Path(path).read_bytes().decode()


def link_reproduction(client: MlflowClient, run_id: str, record: Record) -> None:
    """Say of a run that it makes another one again."""
    client.set_tag(run_id, REPRODUCES_TAG, record.run_id)


def save_card(client: MlflowClient, name: str, version: str, card: str) -> None:
    """Keep a version's card in Markdown: whole with its run, and as the version's description as far as that goes."""
    run_id = str(client.get_model_version(name, version).run_id)
    client.log_text(run_id, card, CARD)
    client.update_model_version(name, version, shorten_card(card, f"The rest is in {CARD} of run {run_id}."))


def shorten_card(card: str, ending: str) -> str:
    """Whole lines of a card, and the ending where some had to go."""
    if len(card) <= LONGEST_DESCRIPTION:
        return card
    start = card[: LONGEST_DESCRIPTION - len(ending) - 2]
    return f"{start[: start.rfind(chr(10))]}\n\n{ending}"
