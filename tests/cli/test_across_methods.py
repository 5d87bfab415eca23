"""What the commands say of every method alike: `inspect --json`, `diff` of two methods, and the kinds of `plot`."""

import json
import re

import pytest
import torch
from cli_tools import delta_layers, deltas

from peft_sparsegrad.cli.plot import Kind
from peft_sparsegrad.cli.saved.methods import METHODS

# Layers, groups and changed tensors that `inspect` must find: six MLP layers of llama, four of GPT-2 with a bias each.
FOUND = {
    "sparsegrad": {"groups": 2, "layers": 6, "tensors": 0},
    "sparsegrad-identity": {"groups": 2, "layers": 6, "tensors": 0},
    "sparsegrad-dynamic": {"groups": 2, "layers": 6, "tensors": 0},
    "sparsegrad-patterns": {"groups": 3, "layers": 6, "tensors": 0},
    "sparsegrad-gpt2": {"groups": 2, "layers": 4, "tensors": 0},
    "graddrop": {"groups": 0, "layers": 0, "tensors": 6},
    "graddrop-sparse": {"groups": 0, "layers": 0, "tensors": 6},
    "graddrop-gpt2": {"groups": 0, "layers": 0, "tensors": 8},
    "lora": {"groups": 0, "layers": 0, "tensors": 0},
    "lora-gpt2": {"groups": 0, "layers": 0, "tensors": 0},
    "ia3": {"groups": 0, "layers": 0, "tensors": 0},
}


@pytest.mark.parametrize("name", FOUND)
def test_inspect_has_the_same_fields_for_every_method(shelf, command, name):
    result = command("inspect", shelf.adapter(name), "--json")
    assert (result.code, result.err) == (0, "")
    found = result.json
    assert {field: len(found[field]) for field in FOUND[name]} == FOUND[name]
    assert list(found) == [
        *("method", "base_model", "task_type", "target_modules", "settings", "parameters", "bytes", "bytes_by_part"),
        *("groups", "layers", "tensors"),
    ]
    assert found["method"] == name.partition("-")[0].upper()
    assert found["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize("name", FOUND)
def test_tables_have_a_row_for_each_fact(shelf, command, name):
    path = shelf.adapter(name)
    found, lines = command("inspect", path, "--json").json, command("inspect", path).out.splitlines()
    titles = {
        "groups": "Groups: layers with common transition matrices",
        "layers": "Layers: the core S of ΔW = V S Uᵀ",
        "tensors": "Changes of the weights",
    }
    names = {"groups": "modules", "layers": "module", "tensors": "parameter"}
    for field, title in titles.items():
        assert (title in [line.rstrip() for line in lines]) == bool(found[field])
        for fact in found[field]:
            assert any(line.startswith(f"{fact[names[field]]} ") for line in lines)


def test_facts_of_graddrop_are_those_of_its_conv1d(shelf, command):
    found = command("inspect", shelf.adapter("graddrop-gpt2"), "--json").json["tensors"]
    layers = delta_layers(shelf.model("graddrop-gpt2"))
    for fact in found:
        module, _, kind = fact["parameter"].rpartition(".")
        delta = getattr(layers[module], f"get_delta_{kind}")("default")
        assert fact["entries"] == delta.numel()
        assert fact["changed"] == torch.count_nonzero(delta)
        assert fact["norm"] == pytest.approx(delta.norm().item(), rel=1e-5)
        assert fact["largest"] == pytest.approx(delta.abs().max().item(), rel=1e-6)


PAIRS = [
    ("sparsegrad-gpt2", "lora-gpt2"),
    ("lora-gpt2", "sparsegrad-gpt2"),
    ("graddrop-gpt2", "sparsegrad-gpt2"),
    ("lora-gpt2", "graddrop-gpt2"),
    ("graddrop", "sparsegrad-identity"),
    ("graddrop", "sparsegrad-dynamic"),
    ("lora-rs", "sparsegrad-full"),
    ("lora", "graddrop"),
]


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_distance_of_two_methods_is_that_of_the_models(shelf, command, a, b):
    result = command("diff", shelf.adapter(a), shelf.adapter(b), "--json")
    assert result.code == 1
    delta_a, delta_b = deltas(shelf.model(a)), deltas(shelf.model(b))
    assert {layer["module"] for layer in result.json["layers"]} == delta_a.keys() == delta_b.keys()
    for layer in result.json["layers"]:
        one, other = delta_a[layer["module"]].double(), delta_b[layer["module"]].double()
        assert one.shape == other.shape
        assert layer["norm_a"] == pytest.approx(one.norm().item(), rel=1e-4)
        assert layer["norm_b"] == pytest.approx(other.norm().item(), rel=1e-4)
        assert layer["distance"] == pytest.approx(((one - other).norm() / one.norm()).item(), rel=1e-4)
        assert layer["product"] == pytest.approx((one * other).sum().item(), abs=1e-5 * layer["norm_a"])
        assert layer["overlap"] is None
    one, other = (torch.cat([each[name].flatten() for name in delta_a]).double() for each in (delta_a, delta_b))
    assert result.json["distance"] == pytest.approx(((one - other).norm() / one.norm()).item(), rel=1e-4)
    assert result.json["cosine"] == pytest.approx(torch.cosine_similarity(one, other, dim=0).item(), abs=1e-4)
    methods = [name.partition("-")[0].upper() for name in (a, b)]
    assert result.json["supports"] == f"a {methods[0]} and a {methods[1]} adapter have none in common"


@pytest.mark.parametrize(("a", "b"), [("graddrop-gpt2", "sparsegrad-gpt2"), ("sparsegrad-gpt2", "lora-gpt2")])
def test_base_model_by_name_changes_nothing(shelf, command, a, b):
    words = ("diff", shelf.adapter(a), shelf.adapter(b), "--json")
    assert command(*words, "--base", shelf.saved_base("gpt2")).json == command(*words).json


def test_methods_that_know_their_shapes_need_no_base_model(shelf, copied, command):
    """Not even for a Conv1D: SparseGrad and LoRA store the change as (out, in) at all times."""
    a, b = copied("sparsegrad-gpt2"), copied("lora-gpt2")
    for path in (a, b):
        config = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "no/such/model"}))
    whole = command("diff", shelf.adapter("sparsegrad-gpt2"), shelf.adapter("lora-gpt2"), "--json").json
    assert command("diff", a, b, "--json").json == whole


def test_wrong_base_model_is_named(shelf, refused):
    gpt2, llama = shelf.saved_base("gpt2"), shelf.saved_base()
    message = refused("diff", shelf.adapter("graddrop"), shelf.adapter("lora"), "--base", gpt2)
    assert "the base model has no linear layer 'model.layers.0.mlp.down_proj'" in message
    message = refused("diff", shelf.adapter("graddrop-gpt2"), shelf.adapter("lora-gpt2"), "--base", llama)
    assert "the base model has no linear layer 'transformer.h.0.mlp.c_fc'" in message


def test_methods_on_other_layers_are_not_compared(shelf, refused):
    for a, b in (("sparsegrad", "lora-attention"), ("lora-attention", "graddrop"), ("sparsegrad", "sparsegrad-gpt2")):
        assert "the adapters are on different layers: only" in refused("diff", shelf.adapter(a), shelf.adapter(b))
    for name in ("sparsegrad", "graddrop", "lora"):
        for pair in ((name, "ia3"), ("ia3", name)):
            message = refused("diff", *map(shelf.adapter, pair))
            assert "adapter cannot be compared: the weights of SPARSEGRAD, GRADDROP, LORA can" in message


@pytest.mark.parametrize("name", ["sparsegrad-gpt2", "graddrop-gpt2", "graddrop-sparse", "lora", "lora-gpt2"])
def test_adapter_is_at_no_distance_from_itself(shelf, command, name):
    result = command("diff", shelf.adapter(name), shelf.adapter(name), "--json")
    assert result.code == 0
    found = result.json
    assert (found["same"], found["config"], found["tensors"], found["distance"]) == (True, {}, [], 0.0)
    assert found["cosine"] == pytest.approx(1.0)
    overlaps = {layer["overlap"] for layer in found["layers"]}
    assert overlaps == ({None} if name.startswith("lora") else {1.0})


def test_kinds_of_plot_keep_their_order(command):
    order = ["support", "active", "spectra", "energy", "gradient", "magnitudes", "rows"]
    assert [kind.value for kind in Kind] == order
    result = command("plot", "x", "--kind", "nope", "--out", "y.png")
    assert result.code == 2
    assert re.findall(r"'([a-z]+)'", result.err.partition("is not one of")[2]) == order


def test_every_kind_of_an_adapter_is_in_the_table(shelf, refused, tmp_path):
    assert {kind for method in METHODS.values() for kind in method.plots} | {"spectra", "energy"} == {*Kind}
    for name, needed in (("graddrop", "SPARSEGRAD"), ("sparsegrad", "GRADDROP")):
        for kind in METHODS[needed].plots:
            message = refused("plot", shelf.adapter(name), "--kind", kind, "--out", tmp_path / "out.png")
            assert f"{kind} is drawn of a {needed} adapter, and this is a {name.upper()} adapter" in message
    for name in ("lora", "ia3"):
        message = refused("plot", shelf.adapter(name), "--out", tmp_path / "out.png")
        assert f"support is drawn of a SPARSEGRAD adapter, and this is a {name.upper()} adapter" in message
    assert not list(tmp_path.iterdir())
