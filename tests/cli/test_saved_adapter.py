"""An adapter's two files: names, shapes and bytes as the header has them, and one sentence where there is none."""

import json

import pytest
import torch
from cli_tools import WEIGHTS
from safetensors.torch import save_file

from peft_sparsegrad.cli.errors import InputError
from peft_sparsegrad.cli.saved.adapter import SavedAdapter, TensorInfo, grouped_by_module, natural_order

CONFIG = "adapter_config.json"
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


@pytest.fixture
def made(tmp_path):
    """Write an adapter with these tensors and settings; returns its folder."""

    def make(tensors, **settings):
        folder = tmp_path / "made"
        folder.mkdir()
        save_file(tensors, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", **settings}))
        return folder

    return make


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_are_those_of_the_tensor(made, dtype):
    tensors = {"a": torch.zeros(3, 5).to(dtype), "b": torch.zeros(()).to(dtype), "c": torch.zeros(0, 2).to(dtype)}
    found = SavedAdapter(made(tensors)).tensors
    for name, tensor in tensors.items():
        assert found[name].shape == tuple(tensor.shape)
        assert found[name].numel == tensor.numel()
        assert found[name].nbytes == tensor.nbytes


def test_info_of_a_single_number():
    assert (TensorInfo((), "F32").numel, TensorInfo((), "F32").nbytes) == (1, 4)
    assert (TensorInfo((7, 0), "I64").numel, TensorInfo((7, 0), "I64").nbytes) == (0, 0)


def test_prefix_of_peft_is_left_out_where_it_is_there(made):
    tensors = {"base_model.model.layers.10.x": torch.ones(1), "layers.9.x": torch.zeros(2), "head.x": torch.ones(3)}
    adapter = SavedAdapter(made(tensors))
    assert list(adapter.tensors) == ["head.x", "layers.9.x", "layers.10.x"]
    assert adapter.tensor("layers.10.x").tolist() == [1.0]
    assert adapter.tensor("layers.9.x").tolist() == [0.0, 0.0]


def test_tensor_that_is_not_there_is_named(made):
    with pytest.raises(InputError, match=r"is damaged at 'base_model\.model\.nope'"):
        SavedAdapter(made({"a": torch.ones(1)})).tensor("nope")


def test_folder_is_found_from_either_of_its_files(shelf):
    path = shelf.adapter("lora")
    whole = SavedAdapter(path)
    for file in (CONFIG, WEIGHTS):
        found = SavedAdapter(path / file)
        assert (found.folder, found.method, found.config) == (path, "LORA", whole.config)
        assert found.tensors == whole.tensors
        assert found.weights_path == path / WEIGHTS


def test_what_is_no_adapter_is_named(made, tmp_path):
    folder = made({"a": torch.ones(1)})
    (tmp_path / "runs" / "b").mkdir(parents=True)
    (tmp_path / "runs" / "a").mkdir()
    cases = {
        "nowhere is not there: name the folder of an adapter": tmp_path / "nowhere",
        "runs holds no adapter: adapter_config.json is missing": tmp_path / "runs",
        "made/adapter.bin is a file: name the folder": folder / "adapter.bin",
    }
    (folder / "adapter.bin").write_bytes(b"")
    for message, path in cases.items():
        with pytest.raises(InputError, match=message):
            SavedAdapter(path)
    for name in "ba":
        (tmp_path / "runs" / name / CONFIG).write_text("{}")
    with pytest.raises(InputError, match="there are adapters in its folders a, b"):
        SavedAdapter(tmp_path / "runs")
    with pytest.raises(InputError, match="it has no `peft_type`"):
        SavedAdapter(tmp_path / "runs" / "a")


@pytest.mark.parametrize("config", ["{", "", "\x00", "[]", "3", '{"peft_type": 3}', '{"peft_type": null}'])
def test_settings_that_are_no_settings_are_refused(made, refused, config):
    folder = made({"a": torch.ones(1)})
    (folder / CONFIG).write_text(config)
    assert CONFIG in refused("inspect", folder)


def test_settings_of_other_bytes_than_text_are_refused(made, refused):
    folder = made({"a": torch.ones(1)})
    (folder / CONFIG).write_bytes(b'{"peft_type": "\xff"}')
    assert f"{CONFIG} is damaged" in refused("inspect", folder)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 20, 100])
def test_weights_cut_off_anywhere_are_refused(copied, refused, kept):
    path = copied("lora")
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:kept])
    for words in (("inspect", path), ("diff", path, path)):
        assert f"{WEIGHTS} is damaged or no safetensors file" in refused(*words)


def test_layers_are_in_natural_order():
    names = ["h.10.b", "h.2.b", "h.2.a", "h.b", "head", "h.1"]
    assert sorted(names, key=natural_order) == ["h.1", "h.2.a", "h.2.b", "h.10.b", "h.b", "head"]


def test_tensors_are_grouped_by_their_module():
    names = ["l.0.up.lora_A.weight", "l.0.up.lora_B.weight", "l.1.up.lora_A.weight", "head.weight", "lora_A.weight"]
    assert grouped_by_module(names, "lora_") == {
        "l.0.up": {"A.weight": names[0], "B.weight": names[1]},
        "l.1.up": {"A.weight": names[2]},
    }
    assert grouped_by_module([], "lora_") == {}
