"""`peft-sparsegrad inspect`: what the two files of an adapter say, held against the model that wrote them."""

import json

import pytest
import torch
from cli_tools import WEIGHTS, changed
from safetensors.torch import load_file, save_file

from peft_sparsegrad.cli.inspect import inspect_adapter
from peft_sparsegrad.cli.saved.adapter import SavedAdapter, natural_order
from peft_sparsegrad.cli.saved.concentration import fewest_with_share
from peft_sparsegrad.cli.saved.graddrop import SavedGradDrop
from peft_sparsegrad.cli.saved.sparsegrad_layers import read_layers
from peft_sparsegrad.sparsegrad.layer import layer_adapters


def real_layers(model):
    """The adapted layers of a model by their names in the base model."""
    base = model.get_base_model()
    return {each.plan.name: base.get_submodule(each.plan.name) for each in layer_adapters(model, "default")}


@pytest.mark.parametrize("name", ["sparsegrad", "sparsegrad-full", "sparsegrad-patterns", "sparsegrad-dynamic"])
def test_layers_are_those_of_the_model(shelf, name):
    found = inspect_adapter(shelf.adapter(name))
    real = real_layers(shelf.model(name))
    assert [layer.module for layer in found.layers] == sorted(real, key=natural_order)
    for facts in found.layers:
        delta = real[facts.module].get_delta_weight("default")
        adapter = real[facts.module].adapter("default")
        assert facts.norm == pytest.approx(delta.norm().item(), rel=1e-4)
        assert facts.values == adapter.values.numel()
        assert facts.share_of_core == adapter.values.numel() / adapter.plan.num_entries
        assert facts.largest == adapter.values.abs().max().item()
        assert (facts.settled, facts.steps) == (True, adapter.num_steps)


@pytest.mark.parametrize("name", ["sparsegrad", "sparsegrad-full", "sparsegrad-patterns", "sparsegrad-dynamic"])
def test_groups_are_those_of_the_model(shelf, name):
    found = inspect_adapter(shelf.adapter(name))
    real = real_layers(shelf.model(name))
    groups = {}
    for layer in real.values():
        groups.setdefault(layer.adapter("default").plan.group_key, []).append(layer)
    assert len(found.groups) == len(groups)
    for facts in found.groups:
        layers = groups[facts.modules, facts.weight_shape, (facts.rank_out, facts.rank_in)]
        assert facts.layers == len(layers)
        assert 0 < facts.orthonormality_error < 1e-3  # of columns that are rounded to float16
        deltas = torch.stack([layer.get_delta_weight("default") for layer in layers]).double()
        expected = torch.linalg.svdvals(deltas).mean(0)[: len(facts.singular_values)]
        assert torch.allclose(torch.tensor(facts.singular_values).double(), expected, atol=1e-4)


def test_what_carries_the_delta(shelf):
    found = inspect_adapter(shelf.adapter("sparsegrad"))
    real = real_layers(shelf.model("sparsegrad"))
    for facts in found.layers:
        adapter = real[facts.module].adapter("default")
        plan, values = adapter.plan, adapter.values
        core = torch.zeros(plan.num_entries, dtype=torch.bool)
        core[adapter.indices] = True
        core = core.view(plan.core_shape)
        assert facts.rows_used == core.any(1).sum()
        assert facts.columns_used == core.any(0).sum()
        energy = values.detach().square().sort(descending=True).values
        held = energy[: facts.hold_90_percent].sum() / energy.sum()
        assert held >= 0.9
        assert (energy[: facts.hold_90_percent - 1].sum() / energy.sum()) < 0.9


def test_fewest_with_share():
    assert fewest_with_share(torch.tensor([0.0, 3.0, -4.0]), 0.6) == 1
    assert fewest_with_share(torch.tensor([0.0, 3.0, -4.0]), 0.7) == 2
    assert fewest_with_share(torch.zeros(3), 0.9) == fewest_with_share(torch.zeros(0), 0.9) == 0
    for seed in range(20):
        torch.manual_seed(seed)
        values = torch.randn(1000) ** (1 + 2 * (seed % 3)) * 10.0 ** (seed - 10)
        energy = values.double().square().sort(descending=True).values.cumsum(0)
        assert fewest_with_share(values, 0.9) == int((energy < 0.9 * energy[-1]).sum()) + 1


@pytest.mark.parametrize("name", ["sparsegrad", "sparsegrad-bert", "graddrop-sparse", "lora", "ia3"])
def test_bytes_by_part_are_those_of_the_file(shelf, name):
    path = shelf.adapter(name)
    found = inspect_adapter(path)
    tensors = load_file(path / WEIGHTS)
    assert sum(found.bytes_by_part.values()) == sum(tensor.nbytes for tensor in tensors.values())
    assert found.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert found.bytes == (path / WEIGHTS).stat().st_size
    if name == "sparsegrad-bert":
        assert found.bytes_by_part["saved in full"] == 4 * (3 * 32 + 3)
    if name == "sparsegrad":
        assert found.bytes_by_part["adapter.values"] == 4 * 6 * 102


def test_identity_basis_tells_its_shape_too(shelf):
    found = inspect_adapter(shelf.adapter("sparsegrad-identity"))
    real = real_layers(shelf.model("sparsegrad-identity"))
    assert {group.weight_shape for group in found.groups} == {(64, 32), (32, 64)}
    assert {group.orthonormality_error for group in found.groups} == {None}
    for facts in found.layers:
        assert facts.share_of_core == facts.values / (64 * 32)
        assert facts.norm == pytest.approx(real[facts.module].get_delta_weight("default").norm().item(), rel=1e-5)


def test_supports_are_read_back(shelf):
    for name in ("sparsegrad", "sparsegrad-full", "sparsegrad-identity"):
        real = real_layers(shelf.model(name))
        for module, layer in read_layers(SavedAdapter(shelf.adapter(name))).items():
            assert torch.equal(layer.indices(), real[module].adapter("default").indices)
            assert layer.plan == real[module].adapter("default").plan


@pytest.mark.parametrize("name", ["graddrop", "graddrop-sparse"])
def test_graddrop_says_what_changed(shelf, name):
    path = shelf.adapter(name)
    found = inspect_adapter(path)
    state = load_file(path / WEIGHTS)
    assert len(found.tensors) == len(SavedGradDrop(SavedAdapter(path)).parameters) == 6
    for tensor in found.tensors:
        module = shelf.model(name).get_base_model().get_submodule(tensor.parameter.removesuffix(".weight"))
        delta = module.get_delta_weight("default")
        if name == "graddrop-sparse":  # the largest tenth was saved
            assert tensor.changed == round(0.1 * delta.numel())
            assert tensor.norm == pytest.approx(
                delta.abs().flatten().topk(tensor.changed).values.norm().item(), rel=1e-4
            )
        else:
            assert tensor.changed == torch.count_nonzero(delta)
            assert tensor.norm == pytest.approx(delta.norm().item(), rel=1e-5)
        assert tensor.entries == delta.numel()
        assert tensor.largest == delta.abs().max().item()
    assert any(key.endswith("_support") for key in state) == (name == "graddrop-sparse")


def test_tables_and_json_say_the_same(shelf, command):
    path = shelf.adapter("sparsegrad")
    table, parsed = command("inspect", path), command("inspect", path, "--json").json
    assert table.code == 0
    for text in ("SPARSEGRAD", "density=0.05", str(shelf / "base-llama"), "model.layers.*.mlp.up_proj", "64 x 32"):
        assert text in table.out
    assert parsed["method"] == "SPARSEGRAD"
    assert parsed["groups"][1]["weight_shape"] == [64, 32]
    assert f"{parsed['bytes']:,}" in table.out
    assert len(parsed["layers"]) == 6


@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_other_methods_get_the_generic_part(shelf, command, name):
    found = command("inspect", shelf.adapter(name), "--json").json
    assert found["method"] == name.upper()
    assert found["target_modules"] == ["down_proj", "up_proj"] or set(found["target_modules"]) == {
        "down_proj",
        "up_proj",
    }
    assert found["layers"] == found["groups"] == found["tensors"] == []
    assert command("inspect", shelf.adapter(name)).code == 0


def test_diverged_adapter_is_named_and_its_json_is_valid(copied, command):
    path = copied("sparsegrad")
    tensors = load_file(path / WEIGHTS)
    key = next(key for key in sorted(tensors) if key.endswith(".values"))
    tensors[key][3] = float("nan")
    save_file(tensors, path / WEIGHTS)
    assert "1 values of model.layers.0.mlp.down_proj are NaN or infinite" in command("inspect", path).out
    found = json.loads(command("inspect", path, "--json").out, parse_constant=pytest.fail)
    assert found["layers"][0]["norm"] is None
    assert found["layers"][0]["non_finite"] == 1


def damaged_support(path):
    tensors = load_file(path / WEIGHTS)
    key = next(key for key in sorted(tensors) if key.endswith(".support"))
    tensors[key] = torch.zeros_like(tensors[key])
    save_file(tensors, path / WEIGHTS)


def without_values(path):
    tensors = load_file(path / WEIGHTS)
    tensors.pop(next(key for key in sorted(tensors) if "values" in key))
    save_file(tensors, path / WEIGHTS)


def without_bases(path):
    tensors = load_file(path / WEIGHTS)
    save_file({key: tensor for key, tensor in tensors.items() if "basis" not in key}, path / WEIGHTS)


def in_config(name, value):
    def damage(path):
        config = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps({**config, name: value}))

    return damage


DAMAGE = {
    "truncated": (lambda p: (p / WEIGHTS).write_bytes((p / WEIGHTS).read_bytes()[:5000]), "is damaged"),
    "no safetensors": (lambda p: (p / WEIGHTS).write_text("hello"), "is damaged or no safetensors file"),
    "weights missing": (lambda p: (p / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
    "pickle": (lambda p: (p / WEIGHTS).rename(p / "adapter_model.bin"), "adapter_model.bin is a pickle"),
    "half a config": (lambda p: (p / "adapter_config.json").write_text('{"peft_type": "SPARSE'), "is damaged"),
    "list as config": (lambda p: (p / "adapter_config.json").write_text("[]"), "it has no `peft_type`"),
    "density": (
        lambda p: (p / "adapter_config.json").write_text('{"peft_type": "SPARSEGRAD", "density": 7}'),
        "`density` must be in",
    ),
    "config missing": (lambda p: (p / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "support": (damaged_support, "the support has 0 entries, not 102"),
    "values": (without_values, "has the tensors"),
    "bases": (without_bases, "should have the shape (64, 20), and is missing"),
    "weight shape": (changed("weight_shape", lambda t: t.fill_(48)), "should have the shape (115,), not (102,)"),
    "no weight shape": (changed("weight_shape", lambda t: t.zero_()), "the weight shape of"),
    "fewer values": (changed("values", lambda t: t[:-1].contiguous()), "should have the shape (102,), not (101,)"),
    "narrower basis": (changed("U", lambda t: t[:, :-1].contiguous()), "should have the shape (64, 20), not (64, 19)"),
    "newer format": (in_config("format_version", 4), "has files of format 4, and this version of peft_sparsegrad"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_adapter_ends_in_one_sentence(copied, refused, kind):
    path = copied("sparsegrad")
    damage, message = DAMAGE[kind]
    damage(path)
    assert message in refused("inspect", path)


def test_what_is_no_adapter_ends_in_one_sentence(shelf, refused, tmp_path):
    assert "this is a whole model" in refused("inspect", shelf.saved_base())
    assert "is not there" in refused("inspect", tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("hello")
    assert "is a file" in refused("inspect", tmp_path / "notes.txt")
    (tmp_path / "run").mkdir()
    shelf.model("sparsegrad").peft_config["default"].save_pretrained(tmp_path / "run" / "second")
    assert "there are adapters in its folders second" in refused("inspect", tmp_path / "run")
