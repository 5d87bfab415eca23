"""Every method that can be read from the disk, held against the PEFT models that wrote the files."""

import re

import pytest
import torch
from cli_tools import WEIGHTS, delta_layers, deltas
from safetensors.torch import load_file

from peft_sparsegrad.cli.errors import InputError
from peft_sparsegrad.cli.saved.adapter import SavedAdapter, natural_order
from peft_sparsegrad.cli.saved.method import EntriesDelta, SavedMethod, WeightLayout
from peft_sparsegrad.cli.saved.methods import METHODS, read_method

ADAPTERS = {
    "SPARSEGRAD": [
        "sparsegrad",
        "sparsegrad-full",
        "sparsegrad-dynamic",
        "sparsegrad-identity",
        "sparsegrad-patterns",
        "sparsegrad-noise",
        "sparsegrad-bert",
        "sparsegrad-gpt2",
    ],
    "GRADDROP": ["graddrop", "graddrop-gpt2", "graddrop-frozen"],
    "LORA": ["lora", "lora-rs", "lora-attention", "lora-gpt2"],
}
CONV1D = [name for names in ADAPTERS.values() for name in names if name.endswith("-gpt2")]
EVERY = [(method, name) for method, names in ADAPTERS.items() for name in names]
every_adapter = pytest.mark.parametrize(("method", "name"), EVERY)


def opened(shelf, name) -> SavedMethod:
    return read_method(SavedAdapter(shelf.adapter(name)))


def layout_of(layer) -> WeightLayout:
    """The way in which the base model of an adapted layer stores its weight."""
    stored = tuple(layer.get_base_layer().weight.shape)
    transposed = bool(getattr(layer, "fan_in_fan_out", False))
    return WeightLayout(stored[::-1] if transposed else stored, transposed)


def test_every_method_of_the_table_is_tested_on_a_conv1d_too():
    assert ADAPTERS.keys() == METHODS.keys()
    assert CONV1D == ["sparsegrad-gpt2", "graddrop-gpt2", "lora-gpt2"]


def test_table_names_each_method_as_peft_does():
    for name, method in METHODS.items():
        assert method.peft_type == name == name.upper()
        assert len(set(method.plots)) == len(method.plots)
    assert [name for name, method in METHODS.items() if not method.converts_to_lora] == ["LORA"]


@every_adapter
def test_reader_is_the_one_of_the_method(shelf, method, name):
    found = opened(shelf, name)
    assert type(found) is METHODS[method]
    assert found.adapter.method == method
    assert found.adapter.folder == shelf.adapter(name)


@every_adapter
def test_modules_are_those_of_the_model(shelf, method, name):
    found = opened(shelf, name).modules
    layers = delta_layers(shelf.model(name))
    assert list(found) == sorted(layers, key=natural_order)
    for module, shape in found.items():
        assert shape == (None if method == "GRADDROP" else layout_of(layers[module]).shape)


@every_adapter
def test_delta_is_that_of_the_model(shelf, method, name):
    found, layers = opened(shelf, name), delta_layers(shelf.model(name))
    for module, expected in deltas(shelf.model(name)).items():
        delta = found.delta(module, layout_of(layers[module]))
        assert delta.dtype == torch.float32
        assert delta.shape == layout_of(layers[module]).shape
        assert torch.allclose(delta, expected, atol=1e-6)
        assert expected.norm() > 0 or name == "graddrop-frozen"


@pytest.mark.parametrize("name", CONV1D)
def test_delta_of_a_conv1d_is_turned(shelf, name):
    """Square weights would hide it: those of the MLP are (32, 128) and (128, 32)."""
    found = opened(shelf, name)
    for module, layer in delta_layers(shelf.model(name)).items():
        layout = layout_of(layer)
        assert layout.transposed
        assert found.delta(module, layout).shape == tuple(layer.get_base_layer().weight.shape[::-1])


@pytest.mark.parametrize("name", ["graddrop", "graddrop-sparse", "graddrop-gpt2", "graddrop-frozen"])
def test_entries_are_the_deltas_of_the_model(shelf, name):
    found, layers = opened(shelf, name), delta_layers(shelf.model(name))
    expected = {f"{module}.weight": layer.get_delta_weight("default") for module, layer in layers.items()}
    biases = {f"{module}.bias": layer.get_delta_bias("default") for module, layer in layers.items()}
    expected |= {parameter: bias for parameter, bias in biases.items() if bias is not None}
    assert set(found.parameters) == expected.keys()
    for parameter, delta in expected.items():
        entries = found.entries(parameter)
        assert entries.shape == tuple(delta.shape)  # as it is stored, for a Conv1D too
        if name == "graddrop-sparse":  # the largest tenth was saved
            count = round(0.1 * delta.numel())
            kept = delta.flatten().abs().topk(count).indices.sort().values
            assert torch.equal(entries.changed, kept)
            assert torch.equal(entries.values, delta.flatten()[kept])
        else:
            assert torch.equal(entries.dense(), delta)
            assert torch.equal(entries.changed, delta.flatten().nonzero().flatten())


def test_biases_of_graddrop_are_entries_and_no_modules(shelf):
    found = opened(shelf, "graddrop-gpt2")
    biases = [parameter for parameter in found.parameters if parameter.endswith(".bias")]
    assert len(biases) == len(found.modules) == 4
    assert not any(module.endswith(".bias") for module in found.modules)


def test_sparse_file_holds_a_part_of_the_delta(shelf):
    """`save_density` leaves the small entries out, and the reader spreads the rest over zeros."""
    found, layers = opened(shelf, "graddrop-sparse"), delta_layers(shelf.model("graddrop-sparse"))
    for module, expected in deltas(shelf.model("graddrop-sparse")).items():
        delta = found.delta(module, layout_of(layers[module]))
        kept = delta != 0
        assert int(kept.sum()) == round(0.1 * delta.numel())
        assert torch.equal(delta[kept], expected[kept])
        assert delta[kept].abs().min() >= expected[~kept].abs().max()


@pytest.mark.parametrize("name", ["sparsegrad", "lora"])
def test_methods_with_a_formula_have_no_entries(shelf, name):
    found = opened(shelf, name)
    assert found.parameters == []
    with pytest.raises(KeyError):
        found.entries("model.layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize("name", [name for name in ADAPTERS["SPARSEGRAD"] if name != "sparsegrad-dynamic"])
def test_support_is_that_of_the_model(shelf, name):
    found = opened(shelf, name)
    for module, layer in delta_layers(shelf.model(name)).items():
        support, adapter = found.support(module), layer.adapter("default")
        assert support.indices.dtype == torch.int64
        assert torch.equal(support.indices, adapter.indices)
        assert len(support.indices) == adapter.values.numel()


@pytest.mark.parametrize("name", ADAPTERS["SPARSEGRAD"])
def test_basis_is_that_of_the_model(shelf, name):
    found = opened(shelf, name)
    for module, layer in delta_layers(shelf.model(name)).items():
        basis = layer.adapter("default").basis
        expected = (None, None) if basis is None else (basis.U, basis.V)
        for matrix, real in zip(found.support(module).basis, expected, strict=True):
            assert (matrix is None) == (real is None)
            assert matrix is None or torch.equal(matrix, real)
    assert (found.support(module).basis == (None, None)) == (name == "sparsegrad-identity")


def test_dynamic_support_is_the_whole_core(shelf):
    found = opened(shelf, "sparsegrad-dynamic")
    for module in found.modules:
        assert found.support(module).indices is None
        assert any(matrix is not None for matrix in found.support(module).basis)


@pytest.mark.parametrize("name", ["graddrop", "graddrop-sparse", "lora"])
def test_other_methods_choose_no_entries(shelf, name):
    found = opened(shelf, name)
    assert {found.support(module) for module in found.modules} == {None}


@pytest.mark.parametrize("shape", [(32, 64), (64, 33), (2048, 1)])
@pytest.mark.parametrize("name", ["sparsegrad", "sparsegrad-identity", "graddrop", "graddrop-sparse", "lora"])
def test_delta_for_a_weight_of_another_shape_is_refused(shelf, name, shape):
    with pytest.raises(InputError, match=re.escape(f" a weight of shape {shape}")):
        opened(shelf, name).delta("model.layers.0.mlp.up_proj", WeightLayout(shape))


@pytest.mark.parametrize("name", CONV1D)
def test_delta_for_a_conv1d_the_wrong_way_round_is_refused(shelf, name):
    found = opened(shelf, name)
    right = WeightLayout((128, 32), transposed=True)
    assert found.delta("transformer.h.0.mlp.c_fc", right).shape == (128, 32)
    with pytest.raises(InputError, match=r"weight of shape \(32, 128\)|weight of shape \(128, 32\)"):
        found.delta("transformer.h.0.mlp.c_fc", WeightLayout((32, 128), transposed=True))


@every_adapter
def test_facts_and_tables_fit_each_other(shelf, method, name):
    found = opened(shelf, name)
    facts = found.facts()
    lengths = {"SPARSEGRAD": ["groups", "layers"], "GRADDROP": ["tensors"], "LORA": []}[method]
    assert list(facts) == lengths
    tables = METHODS[method].tables(facts)
    assert [len(table.rows) for table in tables] == [len(facts[key]) for key in lengths]
    for table in tables:
        assert all(len(row) == len(table.columns) for row in table.rows)


def test_method_that_cannot_be_read_is_named(shelf):
    with pytest.raises(InputError, match="IA3 adapter cannot be read; SPARSEGRAD, GRADDROP, LORA can"):
        read_method(SavedAdapter(shelf.adapter("ia3")))


@every_adapter
def test_tensors_are_read_one_at_a_time_as_they_are_stored(shelf, method, name):
    adapter, stored = SavedAdapter(shelf.adapter(name)), load_file(shelf.adapter(name) / WEIGHTS)
    assert len(adapter.tensors) == len(stored)
    assert list(adapter.tensors) == sorted(adapter.tensors, key=natural_order)
    for short, info in adapter.tensors.items():
        tensor = stored[f"base_model.model.{short}"]
        assert torch.equal(adapter.tensor(short), tensor)
        assert (info.shape, info.numel, info.nbytes) == (tuple(tensor.shape), tensor.numel(), tensor.nbytes)


def test_entries_are_spread_over_the_shape():
    sparse = EntriesDelta(torch.tensor([1, 3, 4]), torch.tensor([2.0, 0.0, -1.0]), (2, 3))
    assert sparse.dense().tolist() == [[0.0, 2.0, 0.0], [0.0, -1.0, 0.0]]
    assert sparse.changed.tolist() == [1, 4]
    whole = EntriesDelta(None, torch.tensor([0.0, 5.0]), (2, 1))
    assert whole.dense().tolist() == [[0.0], [5.0]]
    assert whole.changed.tolist() == [1]
    nothing = EntriesDelta(torch.zeros(0, dtype=torch.int64), torch.zeros(0), (2, 2))
    assert nothing.dense().tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert nothing.changed.tolist() == []
