"""`add_weighted_adapter`: sums that are exact, in adapters that can do what others can."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from fresh import run_program
from peft import PeftModel, get_peft_model
from weighted_adapter_tools import WEIGHTS, deltas, layers, pair, sparsegrad_layers

from peft_sparsegrad import GradDropConfig, SparseGradConfig


def weighted_sum(model, adapters=("x", "y"), weights=WEIGHTS) -> dict[str, torch.Tensor]:
    """Σ w ΔW, added up one by one."""
    total: dict[str, torch.Tensor] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, delta in deltas(model, adapter).items():
            total[name] = total.get(name, 0) + weight * delta
    return total


EXACT = [("sparsegrad", "linear"), ("sparsegrad", "cat"), ("sparsegrad, other bases", "cat")]
EXACT += [("graddrop", "linear"), ("graddrop", "cat")]


@pytest.mark.parametrize(("kind", "combination_type"), EXACT)
def test_sum_is_that_of_the_deltas(kind, combination_type, tmp_path):
    model = pair(kind, tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.add_weighted_adapter(["x", "y"], WEIGHTS, "sum", combination_type)
    torch.testing.assert_close(deltas(model, "sum"), weighted_sum(model), atol=1e-6, rtol=1e-5)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    assert trainable == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert model.active_adapters == ["y"]


@pytest.mark.parametrize(("kind", "combination_type"), EXACT[1:4])
def test_sum_is_a_usual_adapter(kind, combination_type, tmp_path):
    """It computes, merges, is saved and loaded elsewhere, trains on and is deleted."""
    model = pair(kind, tmp_path)
    model.add_weighted_adapter(["x", "y"], WEIGHTS, "sum", combination_type)
    model.set_adapter("sum")
    expected = tiny.logits(model)
    base = tiny.llama()
    weights = dict(base.named_parameters())
    with torch.no_grad():
        for name, delta in weighted_sum(model).items():
            weights[f"{name.removeprefix('base_model.model.')}.weight"] += delta.float()
    torch.testing.assert_close(tiny.logits(base), expected, atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    torch.testing.assert_close(load_elsewhere(tmp_path), expected, atol=1e-5, rtol=1e-4)
    losses = tiny.train(model, steps=4, lr=0.01)
    assert losses[-1] < losses[0]
    model.delete_adapter("sum")
    assert "sum" not in model.peft_config
    merged = PeftModel.from_pretrained(tiny.llama(), tmp_path / "sum").merge_and_unload()
    torch.testing.assert_close(tiny.logits(merged), expected, atol=1e-5, rtol=1e-4)


LOAD = """
import sys
sys.path.insert(0, "tests")
import tiny, torch
from peft import PeftModel
import peft_sparsegrad
model = PeftModel.from_pretrained(tiny.llama(), sys.argv[1] + "/sum")
torch.save(tiny.logits(model), sys.argv[1] + "/logits")
"""


def load_elsewhere(folder) -> torch.Tensor:
    done = run_program("-c", LOAD, folder)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "logits")


@pytest.mark.parametrize("kind", ["sparsegrad", "graddrop"])
def test_scale_of_an_adapter_is_part_of_its_weight(kind, tmp_path):
    model = pair(kind, tmp_path)
    for layer in layers(model).values():
        layer.set_scale("x", 0.5)
    expected = weighted_sum(model)
    model.add_weighted_adapter(["x", "y"], WEIGHTS, "sum")
    for layer in layers(model).values():
        layer.set_scale("x", 3.0)
    torch.testing.assert_close(deltas(model, "sum"), expected, atol=1e-6, rtol=1e-5)


def test_support_of_a_sum_is_the_union(tmp_path):
    model = pair("sparsegrad", tmp_path)
    model.add_weighted_adapter(["x", "y"], WEIGHTS, "sum")
    for layer in sparsegrad_layers(model):
        union = set(layer.adapter("x").indices.tolist()) | set(layer.adapter("y").indices.tolist())
        assert set(layer.adapter("sum").indices.tolist()) == union
        assert layer.adapter("sum").plan.k == len(union)
        assert layer.adapter("sum").plan.ranks == layer.adapter("x").plan.ranks


def test_basis_of_concatenated_ones_is_orthonormal_and_spans_both(tmp_path):
    model = pair("sparsegrad, other bases", tmp_path)
    model.add_weighted_adapter(["x", "y"], WEIGHTS, "sum", "cat")
    for layer in sparsegrad_layers(model):
        one, other, joined = (
            next(side for side in (layer.adapter(name).basis.U, layer.adapter(name).basis.V) if side is not None)
            for name in ("x", "y", "sum")
        )
        assert joined.shape[1] == min(joined.shape[0], one.shape[1] + other.shape[1])
        torch.testing.assert_close(joined.T @ joined, torch.eye(joined.shape[1]), atol=1e-5, rtol=0)
        for columns in (one, other):
            torch.testing.assert_close(joined @ joined.T @ columns, columns, atol=1e-5, rtol=0)


BASES = {
    "full": {"rank": "full"},
    "two-sided": {"rank": (12, 9)},
    "svd": {"basis": "svd"},
    "dynamic": {"support": "dynamic", "rank": (12, 9)},
    "identity": {"basis": "identity"},
}


@pytest.mark.parametrize("case", BASES)
def test_cat_is_exact_in_every_basis(case):
    settings = {"warmup_steps": 0, "init_weights": False, "num_values": 30, **BASES[case]}
    model = get_peft_model(tiny.llama(), SparseGradConfig(**settings), adapter_name="x")
    other = replace(SparseGradConfig(**settings), num_values=settings["num_values"] + 5)
    model.add_adapter("y", other)
    for layer in sparsegrad_layers(model):
        for name in "xy":
            basis = layer.adapter(name).basis
            sides = [basis.U, basis.V]
            basis.fill(*(None if side is None else torch.linalg.qr(torch.randn(side.shape))[0] for side in sides))
    model.add_weighted_adapter(["x", "y"], WEIGHTS, "sum", "cat")
    torch.testing.assert_close(deltas(model, "sum"), weighted_sum(model), atol=2e-6, rtol=1e-5)


def test_fewer_values_than_a_density_can_ask_for(tmp_path):
    """They are joined by zeros, because the new adapter's settings give its numbers of values as densities."""
    settings = {"num_values": 3, "warmup_steps": 0, "init_weights": False}
    model = get_peft_model(tiny.llama(), SparseGradConfig(**settings), adapter_name="x")
    model.add_weighted_adapter(["x"], [2.0], "twice")
    torch.testing.assert_close(deltas(model, "twice"), weighted_sum(model, "x", [2.0]), atol=1e-6, rtol=1e-5)
    model.save_pretrained(tmp_path, selected_adapters=["twice"])
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "twice", adapter_name="twice")
    torch.testing.assert_close(deltas(loaded, "twice"), deltas(model, "twice"))


def test_adapters_on_different_blocks_and_with_several_ranks(tmp_path):
    """Layers of one role with different bases get bases of their own; a layer may have one adapter only."""
    settings = {"warmup_steps": 0, "init_weights": False}
    model = get_peft_model(tiny.llama(), SparseGradConfig(layers_to_transform=[0, 1], **settings), adapter_name="x")
    model.add_adapter("y", SparseGradConfig(layers_to_transform=[1, 2], rank_pattern={"up_proj": 9}, **settings))
    for layer in sparsegrad_layers(model):
        for adapter in layer.adapters:
            basis = adapter.basis
            sides = [basis.U, basis.V]
            basis.fill(*(None if side is None else torch.linalg.qr(torch.randn(side.shape))[0] for side in sides))
    model.add_weighted_adapter(["x", "y"], WEIGHTS, "sum", "cat")
    expected = weighted_sum(model)
    torch.testing.assert_close(deltas(model, "sum"), expected, atol=2e-6, rtol=1e-5)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "sum", adapter_name="sum")
    torch.testing.assert_close(deltas(loaded, "sum"), expected, atol=2e-6, rtol=1e-5)


def test_a_full_density_is_the_sum(tmp_path):
    model = pair("graddrop", tmp_path, target_modules=["down_proj"])
    model.add_weighted_adapter(["x", "y"], WEIGHTS, "sum", "dare_linear", density=1)
    torch.testing.assert_close(deltas(model, "sum"), weighted_sum(model), atol=1e-6, rtol=1e-5)


def test_bf16_base_does_not_round_the_sum(tmp_path):
    model = get_peft_model(tiny.llama().bfloat16(), GradDropConfig(init_weights=False), adapter_name="x")
    model.add_weighted_adapter(["x"], [1 / 3], "third")
    torch.testing.assert_close(deltas(model, "third"), weighted_sum(model, "x", [1 / 3]), atol=0, rtol=1e-6)


def test_other_adapters_keep_their_gradients(tmp_path):
    """PEFT freezes every parameter whose name contains the new adapter's: with the name "l", all of them."""
    model = pair("graddrop", tmp_path)
    model.add_weighted_adapter(["x", "y"], WEIGHTS, "l")
    assert {name for name in "xy" for layer in layers(model).values() if is_trained(layer, name)} == {"y"}
    assert not any(is_trained(layer, "l") for layer in layers(model).values())


def is_trained(layer, adapter_name: str) -> bool:
    return layer.deltas(adapter_name).weight_delta.requires_grad


def test_lora_is_called_in_the_same_way(tmp_path):
    """The control: LoRA's `cat` is exact too, and the new adapter is not active."""
    for kind in ("lora", "graddrop"):
        model = pair(kind, tmp_path)
        model.add_weighted_adapter(["x", "y"], weights=WEIGHTS, adapter_name="sum", combination_type="cat")
        assert model.active_adapters == ["y"]
        named = [module for module in model.modules() if hasattr(module, "get_delta_weight")]
        for layer in named:
            total = sum(w * layer.get_delta_weight(name) for name, w in zip("xy", WEIGHTS, strict=True))
            torch.testing.assert_close(layer.get_delta_weight("sum"), total, atol=1e-5, rtol=1e-4)
