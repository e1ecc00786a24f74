import json
import struct

import pytest
import torch
from torch import nn

from loupe.errors import WeightsError
from loupe.models.files import fit_weights, load_config, load_weights, save_model, save_weights


def build_network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def test_a_saved_network_loads_into_another_of_its_kind(tmp_path):
    network, other = build_network(0), build_network(1)
    save_model(network, {}, tmp_path / "model")
    load_weights(other, tmp_path / "model" / "model.safetensors")
    for key, value in network.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, rtol=0, atol=0)


def test_the_config_comes_back(tmp_path):
    config = {"labels": ["Kätzchen", "dog"], "threshold": 0.25, "size": [64, 64]}
    save_model(build_network(), config, tmp_path / "model")
    assert load_config(tmp_path / "model") == config


def test_a_model_is_safetensors_and_json_and_no_pickle(tmp_path):
    save_model(build_network(), {}, tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    content = (tmp_path / "model" / "model.safetensors").read_bytes()
    (num_bytes,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + num_bytes])
    assert set(header) >= set(build_network().state_dict())


def test_saving_again_replaces_the_model(tmp_path):
    save_model(build_network(0), {"version": 1}, tmp_path)
    save_model(build_network(1), {"version": 2}, tmp_path)
    network = build_network(2)
    load_weights(network, tmp_path / "model.safetensors")
    torch.testing.assert_close(network[0].weight, build_network(1)[0].weight)
    assert load_config(tmp_path) == {"version": 2}


def test_weights_in_another_memory_format_come_back_whole(tmp_path):
    network = build_network().to(memory_format=torch.channels_last)
    save_weights(network.state_dict(), tmp_path / "weights.safetensors")
    other = build_network(1)
    load_weights(other, tmp_path / "weights.safetensors")
    torch.testing.assert_close(other[0].weight, network[0].weight)


def test_a_missing_file_is_a_weights_error(tmp_path):
    with pytest.raises(WeightsError, match=r"missing\.safetensors can't be read as safetensors"):
        load_weights(build_network(), tmp_path / "missing.safetensors")


def test_a_text_is_a_weights_error(tmp_path):
    (tmp_path / "text.safetensors").write_text("not weights")
    with pytest.raises(WeightsError, match="can't be read as safetensors"):
        load_weights(build_network(), tmp_path / "text.safetensors")


def test_a_pickle_is_not_read(tmp_path):
    torch.save(build_network().state_dict(), tmp_path / "pickle.safetensors")
    with pytest.raises(WeightsError, match="can't be read as safetensors"):
        load_weights(build_network(), tmp_path / "pickle.safetensors")


def test_a_truncated_file_is_a_weights_error(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(build_network().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(WeightsError, match="can't be read as safetensors"):
        load_weights(build_network(), path)


def test_a_missing_tensor_is_named():
    state = build_network().state_dict()
    del state["1.weight"]
    with pytest.raises(WeightsError, match=r"weights of here don't fit .*: 1 of its 9 tensors .*, first '1\.weight'"):
        fit_weights(build_network(), state, "here")


def test_a_tensor_too_many_is_named():
    state = {**build_network().state_dict(), "head.weight": torch.zeros(1)}
    with pytest.raises(WeightsError, match=r"first 'head\.weight'"):
        fit_weights(build_network(), state, "here")


def test_the_first_tensor_of_another_shape_is_named():
    state = build_network().state_dict()
    state["0.weight"], state["3.weight"] = torch.zeros(4, 1, 3, 3), torch.zeros(5, 4)
    with pytest.raises(WeightsError, match=r"2 of its 9 tensors .*, first '0\.weight'"):
        fit_weights(build_network(), state, "here")


def test_weights_that_do_not_fit_change_nothing():
    network = build_network()
    before = network[3].weight.clone()
    state = {**build_network(1).state_dict(), "0.weight": torch.zeros(1)}
    with pytest.raises(WeightsError):
        fit_weights(network, state, "here")
    torch.testing.assert_close(network[3].weight, before)
