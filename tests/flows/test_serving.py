"""What is served: Prefect's real server and worker with the deployments of prefect.yaml, over a project of slow stages.

They are small programs, as the orchestration alone is looked at; test_schedule.py runs the real stages.
"""

import contextlib
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import StateType
from prefect.states import Cancelling, Scheduled

from pipelines.worktree import FOLDER
from tests.flows.served import build_environment, connect, serve, wait_for

ROOT = Path(__file__).parent.parent.parent
SERVED = ("pipelines", "prefect.yaml", "prefect.toml", "params.yaml")

# A first stage that is soon done, and a second that counts until it is ended, and has a child of its own.
DVC = """
stages:
  first:
    cmd: python first.py
    deps: [first.py]
    outs: [first]
  second:
    cmd: python second.py
    deps: [second.py, first]
    outs: [second]
"""
FIRST = """
from pathlib import Path
Path("data/memory/first_runs").open("a").write("x")
Path("first").write_text("done")
"""
SECOND = """
import subprocess, sys, time
from pathlib import Path
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
training = Path("data/memory/training")
training.mkdir(exist_ok=True)
count = int((training / "count").read_text()) if (training / "count").exists() else 0
print("starts at", count, file=(training / "starts").open("a"))
while True:
    count += 1
    (training / "count.unfinished").write_text(str(count))
    (training / "count.unfinished").rename(training / "count")
    time.sleep(0.05)
"""
# A champion of random weights, the images that it is known by, others like them, and light ones. What the flow of
# scoring runs is run in this process, since each program would import torch anew.
SCORING = """
from pathlib import Path
import numpy as np
import pandas as pd
from PIL import Image
from loupe.cli import app
from loupe.data.images import Geometry
from loupe.data.manifest import save_table
from loupe.models.classifiers import ClassifierConfig, build_classifier, save_classifier
from loupe.tracking import logged_models, registry
from loupe.tracking.pyfunc import ImageModel, Options
from loupe.tracking.runs import connect, start_run
from pipelines import scoring

generator = np.random.default_rng(0)
for name, lowest in (("known", 0), ("alike", 0), ("lighter", 128)):
    Path(name).mkdir()
    for number in range(30):
        Image.fromarray(generator.integers(lowest, 256, (32, 32, 3), np.uint8)).save(f"{name}/{number}.png")
client, folder, known = connect("pets"), Path("models/classifier"), sorted(Path("known").iterdir())
config = ClassifierConfig("lenet5", ["cat", "dog"], (32, 32), (32, 32), (0.5,) * 3, (0.5,) * 3)
geometry = Geometry(32, 32, 3, 32, 32, 32, 32, "squash", "bilinear")
save_classifier(build_classifier(config, "none"), {"geometry": geometry.to_json()}, folder)
model = ImageModel()
model.load(folder)
embeddings = model.answer([path.read_bytes() for path in known], Options(embeddings=True))["embedding"]
paths = [path.name for path in known]
save_table(pd.DataFrame({"image_id": "0", "path": paths, "embedding": embeddings}), folder / "reference.parquet")
with start_run("classifier", {}, {}) as run_id:
    uri = logged_models.log_model(folder, known[:2])
version = registry.register_version(client, "pets-classifier", run_id, uri).version
client.set_registered_model_alias("pets-classifier", "champion", version)

def run_here(command, timeout_seconds, alone):
    app(command[1:], standalone_mode=False)
    return []

scoring.run_command = run_here
for name in ("alike", "lighter"):
    print(scoring.score(name, "pets-classifier@champion", return_state=True).name)
"""


def copy_served(folder):
    for name in SERVED:
        copy = ["cp", "-r", str(ROOT / name), str(folder)]
        subprocess.run(copy, check=True)
    (folder / "dvc.yaml").write_text(DVC)
    (folder / "first.py").write_text(FIRST)
    (folder / "second.py").write_text(SECOND)
    (folder / ".gitignore").write_text("/first\n/second\n/data/memory\n/.prefect\n__pycache__\n")
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
    for command in (
        ["git", "init", "--quiet"],
        [sys.executable, "-m", "dvc", "init", "--quiet"],
        ["git", "add", "--all"],
        ["git", *identity, "commit", "--quiet", "--message", "start"],
    ):
        subprocess.run(command, cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return copy_served(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def served(project):
    with serve(project) as (process, api):
        assert process.poll() is None, (project / "served.log").read_text()
        yield api


@pytest.fixture(scope="module")
def client(served):
    with connect(served) as client:
        yield client


def start(client, deployment):
    return client.create_flow_run_from_deployment(
        client.read_deployment_by_name(f"retraining/{deployment}").id, state=Scheduled()
    ).id


def find_running(client):
    running = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING]))
    return client.read_flow_runs(flow_run_filter=FlowRunFilter(state=running))


def find_state(client, run):
    return client.read_flow_run(run).state


def find_processes(folder):
    """Ids of those that work in the copy."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if Path(process.cwd()).is_relative_to(folder / FOLDER) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def read_starts(project):
    path = project / "data/memory/retraining/training/starts"
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture(scope="module")
def drifted(client, project, served):
    """The run that the event of drift starts, as soon as it is in its second stage; none comes of images alike."""
    environment = {**build_environment(), "PREFECT_API_URL": served}
    command = [sys.executable, "-c", SCORING]
    answer = subprocess.run(command, cwd=project, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    assert [line for line in answer.stdout.splitlines() if line in ("Completed", "Drifted")] == ["Completed", "Drifted"]
    wait_for(lambda: read_starts(project))
    (run,) = find_running(client)
    return run


def test_the_deployments_are_those_of_the_file(client):
    deployments = {deployment.name: deployment for deployment in client.read_deployments()}
    assert set(deployments) == {"retraining-on-schedule", "retraining-on-drift", "scoring"}
    (schedule,) = deployments["retraining-on-schedule"].schedules
    assert (schedule.schedule.cron, schedule.schedule.timezone) == ("0 3 * * 1", "Europe/Berlin")
    for name in ("retraining-on-schedule", "retraining-on-drift"):
        assert deployments[name].global_concurrency_limit.limit == 1
        assert deployments[name].concurrency_options.collision_strategy.value == "CANCEL_NEW"


def test_drift_starts_a_retraining_and_its_absence_none(client, drifted):
    name = client.read_deployment(drifted.deployment_id).name
    assert name == "retraining-on-drift"
    assert find_state(client, drifted.id).is_running()


def test_a_second_run_of_a_deployment_is_cancelled(client, drifted):
    second = start(client, "retraining-on-drift")
    state = wait_for(lambda: (state := find_state(client, second)).is_final() and state)
    assert state.is_cancelled()
    assert find_state(client, drifted.id).is_running()


def test_a_run_of_another_deployment_is_left_out_with_a_reason(client, drifted):
    second = start(client, "retraining-on-schedule")
    state = wait_for(lambda: (state := find_state(client, second)).is_final() and state)
    assert state.is_cancelled()
    assert "another retraining of this project is running" in state.message
    assert find_state(client, drifted.id).is_running()


def test_cancelling_ends_the_stage_and_its_children_within_ten_seconds_and_the_next_run_goes_on(
    client, project, drifted
):
    assert len(find_processes(project)) >= 3  # DVC, the stage and its child
    client.set_flow_run_state(drifted.id, Cancelling())
    deadline = time.monotonic() + 10
    while find_processes(project) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert find_processes(project) == []
    assert wait_for(lambda: (state := find_state(client, drifted.id)).is_final() and state).is_cancelled()
    count = int((project / "data/memory/retraining/training/count").read_text())

    after = start(client, "retraining-on-schedule")
    wait_for(lambda: len(read_starts(project)) == 2)
    assert read_starts(project) == ["starts at 0", f"starts at {count}"]
    assert (project / "data/memory/retraining/first_runs").read_text() == "x"
    client.set_flow_run_state(after, Cancelling())
    assert wait_for(lambda: (state := find_state(client, after)).is_final() and state).is_cancelled()


def test_a_failure_says_its_sentence_in_the_state_and_as_an_event(client, served, project, drifted):
    params = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(params.replace("data/fashion_mnist/images", "../../../../images"))
    run = start(client, "retraining-on-schedule")
    state = wait_for(lambda: (state := find_state(client, run)).is_final() and state)
    assert state.is_failed()
    assert "give its whole path" in state.message
    wanted = {"filter": {"event": {"name": ["loupe.retraining.finished"]}}}
    (event,) = wait_for(lambda: httpx.post(f"{served}/events/filter", json=wanted).json()["events"])
    assert event["payload"] == {"outcome": "failed", "reason": state.message}


def test_an_interruption_ends_server_worker_and_stages_and_keeps_nobody_out_later(tmp_path):
    project = copy_served(tmp_path)
    with serve(project) as (process, api), connect(api) as client:
        first = start(client, "retraining-on-schedule")
        wait_for(lambda: read_starts(project))
        family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 6
    assert wait_for(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in family))
    with pytest.raises(httpx.ConnectError):
        httpx.get(api)
    with serve(project) as (process, api), connect(api) as client:
        assert find_state(client, first).is_crashed()
        start(client, "retraining-on-schedule")
        wait_for(lambda: len(read_starts(project)) == 2)


def test_a_taken_port_is_refused_in_a_sentence(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [sys.executable, "-m", "pipelines.serving", "--port", str(taken.getsockname()[1])]
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 1
    assert answer.stderr.strip().startswith("error: port ")
    assert answer.stderr.strip().endswith("choose another with PORT=, or end what uses it")
