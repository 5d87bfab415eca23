"""The basis of a weight's own columns: chosen by the gradient, layer by layer, and without a matrix in the file."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from mixtures import EXPERTS, mixtral
from peft import PeftModel, get_peft_model
from safetensors import safe_open

from peft_sparsegrad import SparseGradConfig, convert_to_lora, warmup
from peft_sparsegrad.cli.saved.adapter import SavedAdapter
from peft_sparsegrad.cli.saved.method import WeightLayout
from peft_sparsegrad.cli.saved.sparsegrad import SavedSparseGrad
from peft_sparsegrad.plots import gradient_heat_map
from peft_sparsegrad.sparsegrad.layer import layer_adapters

SETTINGS = {"basis": "columns", "slack": 4.0}


def warmed_up(base=None, seed=0, **settings):
    model = tiny.adapted(base, warmup_steps=2, **{**SETTINGS, **settings})
    warmup(model, [tiny.batch(seed), tiny.batch(seed + 1)], progress=False)
    return model


def test_columns_are_those_whose_gradient_has_most_energy():
    base = tiny.llama()
    names = [adapter.plan.name for adapter in layer_adapters(tiny.adapted(copy.deepcopy(base), **SETTINGS), "default")]
    energy = {name: torch.zeros(base.get_submodule(name).in_features) for name in names}
    model = tiny.adapted(copy.deepcopy(base), warmup_steps=2, **SETTINGS)
    warmup(model, [tiny.batch(0), tiny.batch(1)], progress=False)
    base.train(model.training)
    base(**tiny.batch(0)).loss.backward()  # the first half of the warm-up is for the columns
    for name in names:
        energy[name] += base.get_submodule(name).weight.grad.square().sum(0)
    for adapter in layer_adapters(model, "default"):
        r = adapter.plan.ranks[1]
        assert adapter.plan.ranks[0] is None
        assert set(adapter.basis.U.tolist()) == set(energy[adapter.plan.name].topk(r).indices.tolist())


def test_delta_is_that_of_a_matrix_with_these_columns():
    model = warmed_up()
    tiny.train(model)
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    adapter = layer.adapter("default")
    S = torch.zeros(adapter.plan.num_entries).index_put((adapter.indices,), adapter.values.detach())
    slow = torch.zeros(adapter.plan.weight_shape)
    slow[:, adapter.basis.U.long()] = S.view(adapter.plan.core_shape)
    assert slow.any()
    torch.testing.assert_close(layer.get_delta_weight("default"), slow)


def test_every_layer_chooses_its_own_and_nothing_else_is_kept_of_the_input():
    model = warmed_up(density=0.01)
    bases = [adapter.basis for adapter in layer_adapters(model, "default")]
    assert len(set(map(id, bases))) == len(bases)
    assert all(basis.U.dtype == torch.int32 and basis.V is None for basis in bases)


def test_saved_loaded_and_merged_model_says_the_same(tmp_path):
    base = tiny.llama()
    model = warmed_up(copy.deepcopy(base))
    tiny.train(model)
    expected = model(**tiny.batch(3)).logits
    model.save_pretrained(tmp_path / "adapter")
    with safe_open(tmp_path / "adapter/adapter_model.safetensors", "pt") as file:
        sides = [key for key in file.keys() if ".sparsegrad_basis." in key]  # noqa: SIM118
        assert sides
        assert all(file.get_tensor(key).ndim == 1 for key in sides)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    torch.testing.assert_close(loaded(**tiny.batch(3)).logits, expected)
    torch.testing.assert_close(loaded.merge_and_unload()(**tiny.batch(3)).logits, expected, rtol=1e-4, atol=1e-5)
    resumed = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter", is_trainable=True)
    losses = tiny.train(resumed)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("combination", ["linear", "cat"])
@pytest.mark.parametrize("same_columns", [True, False])
def test_weighted_sum_is_that_of_the_deltas(combination, same_columns):
    model = warmed_up()
    tiny.train(model)
    model.add_adapter("other", SparseGradConfig(task_type="CAUSAL_LM", density=0.05, warmup_steps=2, **SETTINGS))
    model.set_adapter("other")
    warmup(model, [tiny.batch(7), tiny.batch(8)], progress=False)
    pairs = list(zip(layer_adapters(model, "default"), layer_adapters(model, "other"), strict=True))
    for first, second in pairs if same_columns else []:
        second.copy_buffers(first)
    assert all(torch.equal(first.basis.U, second.basis.U) for first, second in pairs) == same_columns
    tiny.train(model)
    model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum", combination_type=combination)
    for name in ("up_proj", "down_proj"):
        layer = model.get_submodule(f"base_model.model.model.layers.2.mlp.{name}")
        expected = 0.5 * layer.get_delta_weight("default") - 2.0 * layer.get_delta_weight("other")
        torch.testing.assert_close(layer.get_delta_weight("sum"), expected, rtol=1e-5, atol=1e-6)


def test_report_has_a_row_for_the_same_layer_of_all_blocks():
    report = warmup(tiny.adapted(**SETTINGS), [tiny.batch(0), tiny.batch(1)], progress=False)
    rows = [(group.name.rpartition(".")[2], group.num_layers, group.method) for group in report.groups]
    assert rows == [("up_proj", 3, "columns"), ("down_proj", 3, "columns")]
    assert all(group.chance_in_core < group.energy_in_core < 1 for group in report.groups)


def test_command_line_reads_and_draws_columns(tmp_path):
    base = tiny.llama()
    base.save_pretrained(tmp_path / "base")
    model = warmed_up(copy.deepcopy(base))
    tiny.train(model)
    model.save_pretrained(tmp_path / "adapter")
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    adapter, gradient = layer.adapter("default"), torch.randn(32, 64)
    saved = SavedSparseGrad(SavedAdapter(tmp_path / "adapter"))
    shape = WeightLayout((32, 64), False)
    torch.testing.assert_close(saved.delta(adapter.plan.name, shape), layer.get_delta_weight("default"))
    assert all(group.orthonormality_error is None for group in saved.facts()["groups"])
    assert gradient_heat_map(gradient, adapter.basis.U, None).axes
    with pytest.raises(ValueError, match="are needed"):
        gradient_heat_map(gradient[:, :8], adapter.basis.U, None)


def test_exact_lora_is_the_same_delta():
    model = warmed_up()
    tiny.train(model)
    config, tensors = (converted := convert_to_lora(model)).config, converted.state_dict
    assert config.r <= max(adapter.plan.ranks[1] for adapter in layer_adapters(model, "default"))
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    (a,) = [t for key, t in tensors.items() if "layers.0.mlp.up_proj.lora_A" in key]
    (b,) = [t for key, t in tensors.items() if "layers.0.mlp.up_proj.lora_B" in key]
    scale = config.lora_alpha / config.r
    torch.testing.assert_close(scale * (b @ a), layer.get_delta_weight("default"), rtol=1e-5, atol=1e-6)


def test_experts_of_a_layer_share_the_columns():
    config = SparseGradConfig(
        task_type="CAUSAL_LM", target_modules=[], target_parameters=EXPERTS, warmup_steps=2, **SETTINGS
    )
    model = get_peft_model(mixtral("eager"), config)
    tiny.train(model, steps=6)
    adapters = layer_adapters(model, "default")
    assert all(adapter.is_settled and adapter.values.any() for adapter in adapters)
    assert all(adapter.basis.U.shape == (adapter.plan.ranks[1],) for adapter in adapters)


@pytest.mark.parametrize("rank", ["full", (4, 8), (4, None)])
def test_rank_that_is_no_number_of_columns_is_refused(rank):
    with pytest.raises(ValueError, match="`rank` must be a number of columns"):
        SparseGradConfig(basis="columns", rank=rank)


@pytest.mark.parametrize("damage", ["order", "range"])
def test_damaged_columns_are_refused(tmp_path, damage):
    base = tiny.llama()
    model = warmed_up(copy.deepcopy(base))
    side = next(iter(layer_adapters(model, "default"))).basis.U
    if damage == "order":
        side[0] = side[1]
    else:
        side[-1] = 10_000
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must number columns"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
