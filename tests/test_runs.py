"""What `loupe runs` lists and compares, of a real store; trainings of several data sets, tasks and ends."""

import subprocess
import sys
from io import StringIO

import pytest
from rich.console import Console

from loupe.errors import ConfigError, TrackingError
from loupe.runs import build_differences, build_figures, build_list, compare_runs, show_runs
from loupe.tracking.records import LONGEST_DESCRIPTION, find_record, list_records, load_environment, shorten_card
from loupe.tracking.runs import connect, log_results, start_run

CLASSIFIER = {"seed": 0, "train_classifier": {"recipe": "fine_tuned", "backbone": "lenet5"}}
DETECTOR = {"seed": 0, "train_detector": {"model": "autoencoder", "backbone": "lenet5"}}
ACCURACY = {"accuracy": 0.9, "accuracy_low": 0.8, "accuracy_high": 0.95, "log_loss": 0.31, "num_images": 1200}
NAMES = ("test/accuracy", "test/log_loss", "test/num_images", "train/seconds")


class Store:
    """Ids of runs: two classifiers of which the second failed, a detector, and one of another data set."""

    def __init__(self, folder):
        self.client = connect("pets")
        self.first = self.train("classifier", CLASSIFIER)
        metrics = {f"classifier/test/{name}": value for name, value in ACCURACY.items()}
        metrics |= {"classifier/test/recall/cat": 0.5, "classifier/export/agrees": 1, "classifier/train/seconds": 12}
        log_results(self.client, self.first, metrics=metrics)
        self.client.create_registered_model("pets-classifier")
        self.client.create_model_version("pets-classifier", folder.as_uri(), self.first)
        self.client.set_registered_model_alias("pets-classifier", "champion", "1")
        with pytest.raises(ConfigError), start_run("classifier", {**CLASSIFIER, "seed": 7}, {"task": "classifier"}):
            raise ConfigError("7 [is] no seed")
        self.failed = list_records(self.client, "pets")[0].run_id
        self.detector = self.train("detector", DETECTOR)
        with start_run("drift", {}, {"task": "drift"}) as self.drift:
            pass
        connect("bolts")
        self.other = self.train("classifier", {**CLASSIFIER, "seed": 3})

    def train(self, task, params):
        with start_run(task, params, {"task": task, "data_digest": "ab" * 32}) as run_id:
            pass
        return run_id


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        yield Store(folder)


def write(table, width=80):
    console = Console(file=StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def read_rows(table):
    """Cells by the first of each row."""
    columns = [list(column.cells) for column in table.columns]
    return {row[0]: list(row[1:]) for row in zip(*columns, strict=True)}


def test_trainings_are_listed_with_the_newest_first_and_nothing_else(store):
    records = list_records(store.client, "pets")
    assert [record.run_id for record in records] == [store.detector, store.failed, store.first]
    assert [record.run_id for record in list_records(store.client, "pets", most=1)] == [store.detector]
    assert [record.run_id for record in list_records(store.client, "pets", "detector")] == [store.detector]
    assert [record.run_id for record in list_records(store.client, "bolts")] == [store.other]


def test_a_row_has_figures_with_intervals_and_the_version_or_the_reason_of_a_failure(store):
    rows = read_rows(build_list("pets", list_records(store.client, "pets")))
    _, trained, result, version, _ = rows[store.first[:8]]
    assert trained == "classifier\nfine_tuned\nlenet5"
    assert result == "accuracy 0.9000\n  (0.8000 to 0.9500)\nlog_loss 0.3100"
    assert version == "1\nchampion"
    assert rows[store.failed[:8]][2] == "FAILED: 7 \\[is] no seed"
    assert rows[store.detector[:8]][1:4] == ["detector\nautoencoder", "not tested yet", "–"]


def test_a_list_is_whole_on_80_columns(store):
    text = write(build_list("pets", list_records(store.client, "pets")))
    for wanted in (store.first[:8], "fine_tuned", "0.9000", "champion", "7 [is] no seed"):
        assert wanted in text
    assert "…" not in text


def test_what_differs_is_shown_and_what_is_the_same_is_not(store):
    records = [find_record(store.client, run_id) for run_id in (store.first, store.other)]
    rows = read_rows(build_differences(records, [load_environment(record) for record in records]))
    assert rows == {"seed": ["0", "3"]}
    same = build_differences([records[0]] * 2, [{}, {}])
    assert "nothing" in write(same)


def test_other_packages_are_a_difference(store):
    records = [find_record(store.client, store.first)] * 2
    rows = read_rows(build_differences(records, [{"torch": "2.11"}, {"torch": "2.12", "cuda": "13"}]))
    assert rows == {"environment: torch": ["2.11", "2.12"], "environment: cuda": ["–", "13"]}


def test_figures_stand_side_by_side_without_those_of_single_labels(store):
    records = [find_record(store.client, run_id) for run_id in (store.first, store.detector)]
    rows = read_rows(build_figures(records))
    assert rows["classifier/test/accuracy"] == ["0.9000\n  (0.8000 to 0.9500)", "–"]
    assert rows["classifier/test/num_images"] == ["1,200", "–"]
    assert set(rows) == {f"classifier/{name}" for name in NAMES}
    records = [find_record(store.client, store.first)] * 2
    assert set(read_rows(build_figures(records))) == set(NAMES)


def test_figures_that_come_again_are_those_of_the_test(store):
    figures = find_record(store.client, store.first).figures
    assert figures["classifier/test/recall/cat"] == 0.5
    assert not {"classifier/export/agrees", "classifier/train/seconds"} & set(figures)


def test_an_id_may_be_shortened_as_long_as_it_names_one_training(store):
    assert find_record(store.client, store.first[:8].upper()).run_id == store.first
    ids = {store.first, store.failed, store.detector, store.other}
    digit = next((digit for digit in "0123456789abcdef" if sum(one.startswith(digit) for one in ids) > 1), None)
    if digit is not None:
        with pytest.raises(TrackingError, match=rf"^several runs begin with {digit}: .*: give more of its id$"):
            find_record(store.client, digit)
    unused = next(digit for digit in "0123456789abcdef" if not any(one.startswith(digit) for one in ids))
    for unknown in (unused, store.drift):
        with pytest.raises(TrackingError, match=f"holds no training {unknown}: `loupe runs` shows them"):
            find_record(store.client, unknown)
    for wrong in ("", "%", "x' OR 1=1"):
        with pytest.raises(TrackingError, match="a run is named by its id or the beginning of it"):
            find_record(store.client, wrong)


def test_an_ambiguous_id_is_one_sentence(store):
    twins = []
    while len({run_id[0] for run_id in twins}) == len(twins):  # at the latest the seventeenth shares its first digit
        run = store.client.create_run("0", tags={"task": "classifier"})
        twins.append(run.info.run_id)
    with pytest.raises(TrackingError, match=rf"^several runs begin with {twins[-1][0]}: "):
        find_record(store.client, twins[-1][0])


def test_the_commands_print_what_they_found(store, capsys):
    show_runs("pets", "classifier", 20)
    compare_runs([store.first, store.other[:10]])
    told = capsys.readouterr().out
    assert "pets: trainings, the newest first" in told
    assert "What differs" in told
    assert "Figures" in told


def test_an_unknown_experiment_task_or_data_set_is_one_sentence(store):
    with pytest.raises(TrackingError, match=r"^MLflow has no experiment 'cars'; it has .*bolts.*pets"):
        show_runs("cars", None, 20)
    assert store.client.get_experiment_by_name("cars") is None
    with pytest.raises(ConfigError, match="--task must be classifier or detector, got 'dog'"):
        show_runs("pets", "dog", 20)
    with pytest.raises(ConfigError, match=r"listing\.json does not exist"):
        show_runs(None, None, 20)


def test_a_long_card_is_cut_between_lines_and_says_where_the_rest_is():
    card = "\n".join(f"line {number}" for number in range(2000))
    short = shorten_card(card, "The rest is elsewhere.")
    assert len(short) <= LONGEST_DESCRIPTION
    *lines, blank, ending = short.split("\n")
    assert (blank, ending) == ("", "The rest is elsewhere.")
    assert lines == card.split("\n")[: len(lines)]
    assert shorten_card("short", "The rest is elsewhere.") == "short"


def test_the_command_refuses_filters_beside_ids(store):
    command = [sys.executable, "-m", "loupe.cli", "runs", "ab", "--task", "classifier"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 1
    assert answer.stderr.startswith("error: --experiment and --task are for the list")
