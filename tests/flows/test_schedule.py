"""Retraining by itself: a schedule of a minute over the real stages, on few and small images.

Nobody asks for a run between the first and the last: images are added, and what came of it is read.
"""

import itertools
import subprocess
from functools import partial

import httpx
import numpy as np
import pytest
from PIL import Image
from prefect.client.schemas.sorting import FlowRunSort

from loupe.cli import change_params
from tests.flows.conftest import copy_project
from tests.flows.served import connect, serve, wait_for


def draw_tiles(folder, numbers):
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        values = np.random.default_rng((number, len(folder.parent.name))).integers(90, 110, (40, 48), np.uint8)
        if folder.name == "scratch":
            values[:, 20:24] = 255
        Image.fromarray(values).save(folder / f"{number}.png")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = copy_project(tmp_path_factory.mktemp("scheduled"))
    tiles = folder.parent / "tiles"
    draw_tiles(tiles / "train" / "good", range(30))
    for label in ("good", "scratch"):
        draw_tiles(tiles / "test" / label, range(6))
    change_params(folder / "params.yaml", {"ingest.source": str(tiles), "promote.detector.floor": 0.2})
    return folder


def list_finished(client):
    """Runs that were not cancelled, the oldest first."""
    runs = client.read_flow_runs(sort=FlowRunSort.START_TIME_ASC)
    return [run for run in runs if run.state.is_completed() or run.state.is_failed() or run.state.is_crashed()]


@pytest.fixture(scope="module")
def history(project):
    """The first three runs, with the run's events, after the first of which images were added."""
    with serve(project, "--cron", "* * * * *") as (_, api), connect(api) as client:
        wait_for(lambda: list_finished(client))
        draw_tiles(project.parent / "tiles" / "train" / "good", range(30, 36))
        wait_for(lambda: len(list_finished(client)) >= 3)
        wanted = {"filter": {"event": {"name": ["loupe.retraining.finished"]}}}
        ask = partial(httpx.post, f"{api}/events/filter", json=wanted)
        events = wait_for(lambda: len(events := ask().json()["events"]) >= 3 and events)
        events.sort(key=lambda event: event["occurred"])
        return list_finished(client)[:3], [event["payload"] for event in events[:3]]


def git(project, *arguments):
    return subprocess.run(["git", *arguments], cwd=project, capture_output=True, text=True, check=True).stdout.strip()


def test_it_trains_retrains_for_new_images_and_then_has_nothing_to_do(history):
    runs, _ = history
    assert [run.state.name for run in runs] == ["Retrained", "Retrained", "Unchanged"], [run.state for run in runs]
    assert runs[2].state.message == "Nothing changed, and nothing was computed."


def test_no_two_runs_overlap(history):
    runs, _ = history
    assert all(one.end_time <= other.start_time for one, other in itertools.pairwise(runs))


def test_each_outcome_is_an_event(history):
    _, events = history
    assert [event["outcome"] for event in events] == ["retrained", "retrained", "unchanged"]
    assert [event["branch"] is None for event in events] == [False, False, True]
    assert events[0]["detector/decision"] == "promoted"


def test_each_retraining_left_a_branch_with_its_results_and_the_working_copy_as_it_was(project, history):
    first, second = git(project, "branch", "--list", "retraining/*", "--format=%(refname:short)").split()
    assert git(project, "diff", "--name-only", first, second).split() == ["dvc.lock"]
    assert git(project, "diff", "--name-only") == "params.yaml"
    assert not (project / "models/detector/model.safetensors").exists()


def test_a_merged_branch_has_all_that_was_computed(project, history):
    branch = git(project, "branch", "--list", "retraining/*", "--format=%(refname:short)").split()[-1]
    git(project, "checkout", "--quiet", "params.yaml")
    git(project, "-c", "user.name=test", "-c", "user.email=test@example.invalid", "merge", "--quiet", branch)
    subprocess.run(["dvc", "checkout", "--quiet", "--allow-missing"], cwd=project, check=True)
    status = subprocess.run(["dvc", "status", "dvc.yaml"], cwd=project, capture_output=True, text=True, check=True)
    assert "up to date" in status.stdout
