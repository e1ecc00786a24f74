import copy

import pydantic
import pytest
import yaml

from loupe.cli import change_params
from loupe.config import load_params, parse_params
from loupe.errors import ConfigError


@pytest.fixture
def values(repository):
    return yaml.safe_load((repository / "params.yaml").read_text(encoding="utf-8"))


def put(values, key, value):
    """A copy of the values with another one at a dotted key."""
    changed = copy.deepcopy(values)
    *sections, last = key.split(".")
    section = changed
    for name in sections:
        section = section[name]
    section[last] = value
    return changed


def message_of(values):
    with pytest.raises(ConfigError) as caught:
        parse_params(values)
    return str(caught.value)


def test_the_params_of_the_repository_are_valid(repository, values):
    params = load_params(repository / "params.yaml")
    assert params.seed == values["seed"]
    assert params.validate_.min_side == values["validate"]["min_side"]


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("sed", "seed"),
        ("ingest.sorce", "source"),
        ("validates", "validate"),
        ("train_classifier.learning_rat", "learning_rate"),
        ("prepare.detector.imput_size", "input_size"),
        ("promote.classifier.flor", "floor"),
    ],
)
def test_an_unknown_key_fails_with_the_nearest_name(values, key, nearest):
    message = message_of(put(values, key, 1))
    assert message == f"params.yaml: {key} is not a known key; did you mean {nearest!r}?"


def test_a_recipe_from_scratch_takes_no_weights(values):
    scratch = put(values, "train_classifier.recipe", "scratch")
    message = message_of(put(scratch, "train_classifier.weights", "package"))
    expected = "train_classifier: weights must be auto or none with the recipe scratch, got 'package'"
    assert message == f"params.yaml: {expected}"


def test_an_unknown_recipe_is_answered_with_the_recipes(values):
    message = message_of(put(values, "train_classifier.recipe", "fine_tune"))
    assert "'features_augmented' or 'fine_tuned', got 'fine_tune'; did you mean 'fine_tuned'?" in message


def test_an_unknown_key_that_resembles_none_lists_the_known_keys(values):
    message = message_of(put(values, "validate.zzz", 1))
    assert message.endswith("known keys: max_aspect, max_bad_fraction, max_side, min_contrast, min_images, min_side")


def test_a_missing_key_is_named(values):
    del values["train_detector"]["autoencoder"]["patience"]
    assert message_of(values) == "params.yaml: train_detector.autoencoder.patience is missing"


def test_a_missing_section_is_named(values):
    del values["split"]
    assert message_of(values) == "params.yaml: split is missing"


def test_the_seed_is_required(values):
    del values["seed"]
    assert message_of(values) == "params.yaml: seed is missing"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("seed", "0", "seed must be a valid integer, got '0'"),
        ("seed", True, "seed must be a valid integer, got True"),
        ("seed", 1.5, "seed must be a valid integer, got 1.5"),
        ("ingest.source", 3, "ingest.source must be a valid string, got 3"),
        ("split.normal_labels", "good", "split.normal_labels must be a valid list, got 'good'"),
        ("augment.classifier", 3, "augment.classifier must be a valid string or a valid list, got 3"),
        ("train_classifier.epochs", "few", "train_classifier.epochs must be a valid integer or 'auto', got 'few'"),
    ],
)
def test_a_value_of_the_wrong_type_is_one_sentence_with_the_key_and_what_came(values, key, value, expected):
    assert message_of(put(values, key, value)) == f"params.yaml: {expected}"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("seed", -1, "seed must be greater than or equal to 0, got -1"),
        ("seed", 2**32, "seed must be less than 4294967296, got 4294967296"),
        ("fetch.fraction", 0, "fetch.fraction must be greater than 0, got 0"),
        ("fetch.fraction", 1.5, "fetch.fraction must be less than or equal to 1, got 1.5"),
        ("validate.min_side", 0, "validate.min_side must be greater than 0, got 0"),
        ("validate.max_aspect", 0.5, "validate.max_aspect must be greater than or equal to 1, got 0.5"),
        ("train_classifier.label_smoothing", 1, "train_classifier.label_smoothing must be less than 1, got 1"),
        (
            "train_detector.false_alarm_rate",
            1,
            "train_detector.false_alarm_rate must be less than 1 or 'auto' or 'by_cost', got 1",
        ),
        ("promote.detector.margin", -0.1, "promote.detector.margin must be greater than or equal to 0, got -0.1"),
    ],
)
def test_a_value_out_of_range_is_one_sentence_with_the_key_and_what_came(values, key, value, expected):
    assert message_of(put(values, key, value)) == f"params.yaml: {expected}"


def test_a_word_that_is_no_choice_is_answered_with_the_choices(values):
    message = message_of(put(values, "ingest.layout", "folders"))
    choices = "'class_folders', 'split_folders', 'mvtec', 'table' or 'unlabelled'"
    assert f"{choices}, got 'folders'; did you mean 'split_folders'?" in message


def test_a_value_with_a_bar_in_it_is_repeated_as_it_came(values):
    assert message_of(put(values, "ingest.layout", "mvtec|auto")).endswith("got 'mvtec|auto'; did you mean 'mvtec'?")


def test_a_detector_size_that_its_network_can_not_halve_three_times_fails(values):
    message = message_of(put(values, "prepare.detector.input_size", 100))
    assert message.startswith("params.yaml: prepare.detector.input_size must be a multiple of ")
    assert message.endswith("got 100")


def test_an_empty_section_names_the_section(values):
    message = message_of(put(values, "ingest", None))
    assert message.startswith("params.yaml: ingest must be")
    assert message.endswith("got None")


def test_held_out_fractions_that_leave_nothing_to_train_on_fail(values):
    message = message_of(put(values, "split.val_fraction", 0.7))
    assert message == "params.yaml: split: val, calibration and test fractions must sum to less than 1, got 1"


def test_a_smallest_side_above_the_largest_fails(values):
    message = message_of(put(values, "validate.min_side", 30000))
    assert message == "params.yaml: validate: min_side must be at most max_side, got 30000 and 20000"


def test_two_problems_are_both_told(values):
    message = message_of(put(put(values, "seed", -1), "split.val", 0.1))
    assert "seed must be greater than or equal to 0, got -1" in message
    assert "split.val is not a known key" in message


def test_auto_stands_where_the_data_decides(values):
    params = parse_params(put(values, "prepare.classifier", {"input_size": "auto", "fit": "auto"}))
    assert params.prepare.classifier.input_size == "auto"


def test_an_augmentation_policy_may_be_written_out(values):
    policy = [{"name": "HorizontalFlip", "p": 0.5}]
    assert parse_params(put(values, "augment.detector", policy)).augment.detector == policy


def test_loaded_params_do_not_change(values):
    params = parse_params(values)
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        params.seed = 1


def test_a_missing_file_says_where_to_run(tmp_path):
    with pytest.raises(ConfigError, match=r"params\.yaml can't be read .*: run this in the folder that holds it"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"seed: [0\n", "is not valid YAML"),
        (b"", "must hold sections of keys and values, got NoneType"),
        (b"- seed\n", "must hold sections of keys and values, got list"),
    ],
)
def test_a_file_that_holds_no_sections_is_a_config_error_of_one_line(tmp_path, content, expected):
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_params(path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_values_are_read_as_they_are_written_by_yaml_1_2(tmp_path, repository):
    path = tmp_path / "params.yaml"
    path.write_text((repository / "params.yaml").read_text())
    change_params(path, {"train_classifier.learning_rate": 1e-5, "split.normal_labels": ["no", "on"]})
    params = load_params(path)
    assert params.train_classifier.learning_rate == 1e-5
    assert params.split.normal_labels == ["no", "on"]


def test_a_file_that_is_not_utf_8_is_a_config_error(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_bytes("name: café\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"params\.yaml"):
        load_params(path)
