"""What `make ui` opens: MLflow's and Prefect's pages over real records, as Chromium shows them."""

import io
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image
from playwright.sync_api import expect
from scipy.ndimage import label

from loupe.experiments import build_address
from loupe.tracking.runs import connect, log_epoch, log_results, start_run
from tests.flows.served import build_environment, find_free_port, wait_for

ROOT = Path(__file__).parent.parent.parent
SERVED = ("pipelines", "prefect.yaml", "prefect.toml", "params.yaml")
PATIENCE_MS = 60_000
ACCURACIES = {"scratch": 0.713, "fine_tuned": 0.931}
TASKS = ("train_classifier", "evaluate_classifier")
COMPLETED = (33, 157, 75)  # the green of its bar in the graph

# A training in small, and the pool that prefect.yaml names. It says the id of its run.
FLOW = """
from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.workers.process import ProcessWorker

@task
def train_classifier():
    return 0.931

@task
def evaluate_classifier(accuracy):
    return accuracy

@flow(name="training")
def train():
    accuracy = evaluate_classifier(train_classifier())
    create_markdown_artifact(f"The classifier is right on **{accuracy:.1%}** of the images.", key="training-summary")

template = ProcessWorker.get_default_base_job_template()
with get_client(sync_client=True) as client:
    client.create_work_pool(WorkPoolCreate(name="loupe", type=ProcessWorker.type, base_job_template=template))
print(train(return_state=True).state_details.flow_run_id)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    for name in SERVED:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name)
    (folder / "training.py").write_text(FLOW)
    return folder


@pytest.fixture(scope="module")
def trained(project):
    """Ids of two runs by their names, and of their experiment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project / 'mlflow.db'}")
        client = connect("flowers")
        run_ids = {recipe: record_training(client, recipe, project / "confusion.png") for recipe in ACCURACIES}
        return run_ids, client.get_experiment_by_name("flowers").experiment_id


def record_training(client, recipe, picture):
    params = {"train_classifier": {"recipe": recipe, "backbone": "lenet5"}}
    with start_run(recipe, params, {"task": "classifier"}) as run_id:
        for epoch in range(3):
            log_epoch(epoch, {"train/loss": 1 / (epoch + 1), "val/accuracy": ACCURACIES[recipe] - 0.1 / (epoch + 1)})
    Image.new("L", (640, 480)).save(picture)
    log_results(
        client,
        run_id,
        metrics={"classifier/test/accuracy": ACCURACIES[recipe], "classifier/test/num_images": 734},
        files=[picture],
    )
    return run_id


@pytest.fixture(scope="module")
def served(project, trained):
    """The process of `loupe ui`, and the addresses of MLflow's page and Prefect's."""
    ports = find_free_port(), find_free_port()
    addresses = [f"http://127.0.0.1:{port}" for port in ports]
    command = [sys.executable, "-m", "loupe.cli", "ui", "--mlflow-port", str(ports[0]), "--prefect-port", str(ports[1])]
    with (
        (project / "ui.log").open("w") as log,
        subprocess.Popen(command, cwd=project, env=build_environment(), stdout=log, stderr=log) as process,
    ):
        try:
            for path in (f"{addresses[0]}/health", f"{addresses[1]}/api/health"):
                wait_for(lambda path=path: answers(path) or process.poll() is not None)
            assert process.poll() is None, (project / "ui.log").read_text()
            yield process, *addresses
        finally:
            process.terminate()


def answers(address):
    try:
        return httpx.get(address, timeout=5).is_success
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def flow_run(project, served):
    """The id of a run of a flow, in a server that has the deployments of prefect.yaml as well."""
    environment = {**build_environment(), "PREFECT_API_URL": f"{served[2]}/api", "PWD": str(project)}

    def call(*arguments):
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=project, env=environment, check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    run_id = call("training.py").strip()
    call("-m", "prefect", "--no-prompt", "deploy", "--all")
    return run_id


@pytest.fixture
def page(browser):
    """A page that may ask this machine alone."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.set_default_timeout(PATIENCE_MS)
    asked = set()
    page.on("request", lambda request: asked.add(urlsplit(request.url)))
    yield page
    page.close()
    assert {address.hostname for address in asked if address.scheme in ("http", "https")} == {"127.0.0.1"}


def see(locator, text=None):
    expect(locator).to_be_visible(timeout=PATIENCE_MS)
    if text is not None:
        expect(locator).to_contain_text(text, timeout=PATIENCE_MS)


def find_row(page, name):
    return page.get_by_role("row").filter(has=page.get_by_text(name, exact=True))


def find_height(locator):
    see(locator)
    return locator.bounding_box()["y"]


def test_two_runs_stand_side_by_side_with_what_differs(page, served, trained):
    run_ids, experiment_id = trained
    address = urlsplit(build_address(experiment_id, list(run_ids.values())))
    page.goto(f"{served[1]}/#{address.fragment}")
    see(page.get_by_text("Comparing 2 Runs from 1 Experiment"))
    for recipe, accuracy in ACCURACIES.items():
        see(find_row(page, "Run Name:"), recipe)
        see(find_row(page, "train_classifier.recipe"), recipe)
        figure = page.get_by_text(f"{accuracy}", exact=True).first
        assert abs(find_height(figure) - find_height(page.get_by_text("classifier/test/accuracy", exact=True))) < 20
    see(find_row(page, "train_classifier.backbone"))
    page.get_by_label("Parameters - Show diff only").click()
    expect(find_row(page, "train_classifier.backbone")).to_have_count(0, timeout=PATIENCE_MS)
    see(find_row(page, "train_classifier.recipe"))


def test_a_run_has_its_picture(page, served, trained):
    run_ids, experiment_id = trained
    run = f"{served[1]}/#/experiments/{experiment_id}/runs/{run_ids['fine_tuned']}"
    page.goto(f"{run}/artifacts/pictures/confusion.png")
    picture = page.get_by_alt_text("pictures/confusion.png").first
    expect(picture).to_have_js_property("naturalWidth", 640, timeout=PATIENCE_MS)


def test_a_flow_run_has_its_graph_its_tasks_and_its_artifact(page, served, flow_run):
    page.goto(f"{served[2]}/runs/flow-run/{flow_run}")
    see(page.get_by_text("Completed", exact=True).first)
    graph = page.locator("canvas")
    see(graph)
    wait_for(lambda: count_bars(graph.screenshot()) == len(TASKS))
    page.locator(".p-tab", has_text="Task Runs").click()
    for task in TASKS:
        see(page.get_by_text(re.compile(f"^{task}-")).first)
    page.locator(".p-tab", has_text="Artifacts").click()
    page.get_by_text("training-summary", exact=True).click()
    see(page.get_by_text("The classifier is right on 93.1% of the images."))


def count_bars(screenshot):
    """How many parts of the picture have the green of a task that completed; below them is the flow's own bar."""
    pixels = np.asarray(Image.open(io.BytesIO(screenshot)).convert("RGB"), dtype=int)
    green = np.abs(pixels - COMPLETED).max(2) < 20
    _, areas = label(green[: int(0.9 * len(green))])
    return areas


def find_deployment(page, name):
    """Its line in the list; the popover of a run that is due has the name as well."""
    return page.locator(f"a[title='{name}']")


def test_the_deployments_have_their_schedule(page, served, flow_run):
    page.goto(f"{served[2]}/deployments")
    for name in ("retraining-on-drift", "scoring"):
        see(find_deployment(page, name))
    find_deployment(page, "retraining-on-schedule").click()
    see(page.get_by_text("At 03:00 AM, only on Monday", exact=True))


def test_an_interruption_ends_both_servers_and_all_that_they_started(browser, served):
    process, *addresses = served
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 3  # MLflow's server, its worker, Prefect's server
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_MS / 1000) == 0
    assert not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    assert not any(answers(address) for address in addresses)


def test_one_port_for_both_is_refused(project):
    command = [sys.executable, "-m", "loupe.cli", "ui", "--mlflow-port", "5001", "--prefect-port", "5001"]
    answer = subprocess.run(command, cwd=project, env=build_environment(), capture_output=True, text=True, check=False)
    assert answer.returncode == 1
    assert answer.stderr == "error: --mlflow-port and --prefect-port must differ; both are 5001\n"
