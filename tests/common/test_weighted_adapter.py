"""`add_weighted_adapter`: sums that are exact, pruning and elections as in LoRA, refusals that change nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import tiny
import torch
from fresh import run_program
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import merge_utils

from peft_sparsegrad import GradDropConfig, SparseGradConfig, save_transition_matrices, warmup
from peft_sparsegrad.common.delta_layer import DeltaLayer

WEIGHTS = [0.7, -0.4]


def pair(kind: str, tmp_path, **settings) -> PeftModel:
    """A model with two trained adapters, "x" and "y"; those of `sparsegrad` share their bases."""
    torch.manual_seed(0)
    model = tiny.llama()
    if kind == "graddrop":
        configs = [GradDropConfig(**settings, init_weights=False) for _ in "xy"]
    elif kind == "lora":
        configs = [LoraConfig(target_modules=["up_proj", "down_proj"], init_lora_weights=False) for _ in "xy"]
    else:
        configs = [SparseGradConfig(density=0.05, slack=3, warmup_steps=4, **settings) for _ in "xy"]
    model = get_peft_model(model, configs[0], adapter_name="x")
    if kind.startswith("sparsegrad"):
        warmup(model, [tiny.batch(seed) for seed in range(2)], adapter_name="x", progress=False)
        save_transition_matrices(model, tmp_path / "matrices.safetensors", "x")
        if kind == "sparsegrad":
            configs[1] = replace(configs[1], transition_matrices=str(tmp_path / "matrices.safetensors"))
    model.add_adapter("y", configs[1])
    model.set_adapter("y")
    if kind == "sparsegrad, other bases":
        warmup(model, [tiny.batch(seed) for seed in range(7, 9)], adapter_name="y", progress=False)
    for number, layer in enumerate(sparsegrad_layers(model)):
        for name in "xy":
            torch.nn.init.normal_(layer.adapter(name).values, std=0.1)
        if kind == "sparsegrad":  # supports of their own, as renewals give
            adapter = layer.adapter("y")
            generator = torch.Generator().manual_seed(number)
            adapter.place(torch.randperm(adapter.plan.num_entries, generator=generator)[: adapter.plan.k])
    return model


def sparsegrad_layers(model) -> list:
    return [module for module in model.modules() if hasattr(module, "sparsegrad_adapter")]


def layers(model) -> dict[str, DeltaLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, DeltaLayer)}


def deltas(model, adapter_name: str) -> dict[str, torch.Tensor]:
    """Weight and bias deltas in float64, by module; only of the layers that have the adapter."""
    found = {}
    for name, layer in layers(model).items():
        if layer.has_adapter(adapter_name):
            found[name] = layer.get_delta_weight(adapter_name).double()
            if (bias := layer.get_delta_bias(adapter_name)) is not None:
                found[f"{name}.bias"] = bias.double()
    return found


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


def slow_ties(tensors, weights, density, by_number=False):
    """TIES entry by entry: keep the largest, elect a sign, average what has it."""
    kept = []
    for tensor in tensors:
        largest = tensor.abs().flatten().sort(descending=True).indices[: int(density * tensor.numel())].tolist()
        flat = tensor.flatten().tolist()
        kept.append([value if place in largest else 0.0 for place, value in enumerate(flat)])
    merged = []
    for entries in zip(*kept, strict=True):
        votes = [math.copysign(1, e) if e else 0 for e in entries] if by_number else entries
        sign = 1 if sum(votes) >= 0 else -1
        winners = [w * e for w, e in zip(weights, entries, strict=True) if e * sign > 0]
        merged.append(sum(winners) / max(1, len(winners)))
    return torch.tensor(merged, dtype=torch.float64).view(tensors[0].shape)


@pytest.mark.parametrize("method", ["total", "frequency"])
def test_ties_elects_signs_as_the_slow_twin(method, tmp_path):
    model = pair("graddrop", tmp_path, target_modules=["down_proj"])
    settings = {"density": 0.3, "majority_sign_method": method}
    model.add_weighted_adapter(["x", "y"], WEIGHTS, "ties", "ties", **settings)
    one, other, got = (deltas(model, name) for name in ("x", "y", "ties"))
    for name, delta in got.items():
        wanted = slow_ties([one[name], other[name]], WEIGHTS, 0.3, method == "frequency")
        torch.testing.assert_close(delta, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["ties", "magnitude_prune", "dare_linear", "dare_ties"])
def test_cores_with_one_support_are_merged_as_peft_merges_tensors(kind, tmp_path):
    model = pair("sparsegrad", tmp_path)
    layer = sparsegrad_layers(model)[-1]
    for name in ("support", "slots"):
        getattr(layer.adapter("y"), name).copy_(getattr(layer.adapter("x"), name))
    values = [layer.adapter(name).values.detach().double() for name in "xy"]
    before = [other for other in sparsegrad_layers(model) if other is not layer]
    for other in before:  # only one layer draws from the generator
        other.delete_adapter("x")
        other.delete_adapter("y")
    torch.manual_seed(5)
    wanted = getattr(merge_utils, kind)(values, torch.tensor(WEIGHTS, dtype=torch.float64), 0.5)
    torch.manual_seed(5)
    model.add_weighted_adapter(["x", "y"], WEIGHTS, "merged", kind, density=0.5)
    order = layer.adapter("x").indices.argsort()
    got = layer.adapter("merged").core.matrix(torch.float64).flatten()[layer.adapter("x").indices[order]]
    torch.testing.assert_close(got, wanted[order], atol=1e-6, rtol=1e-5)


def test_density_counts_the_values_of_each_adapter(tmp_path):
    """And not the entries of the core, most of which are zero anyway."""
    model = pair("sparsegrad", tmp_path)
    model.add_weighted_adapter(["x"], [2.0], "pruned", "magnitude_prune", density=0.25)
    for layer in sparsegrad_layers(model):
        values = layer.adapter("x").values.detach()
        kept = 2 * values.abs().sort(descending=True).values[: int(0.25 * len(values))]
        got = layer.adapter("pruned").values.detach().abs().sort(descending=True).values
        torch.testing.assert_close(got[: len(kept)], kept)
        assert not got[len(kept) :].any()


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


BAD = {
    "an unknown name": ({"adapters": ["x", "c"]}, r"`adapters`: the model has no adapter 'c', only x, y"),
    "no name": ({"adapters": [], "weights": []}, "`adapters` must be a list with at least one"),
    "a string": ({"adapters": "xy"}, "`adapters` must be a list"),
    "too few weights": ({"weights": [1.0]}, r"`weights` must be 2 numbers, one an adapter, not \[1.0\]"),
    "a weight of NaN": ({"weights": [1.0, math.nan]}, "`weights` must be finite"),
    "a weight of Inf": ({"weights": [1.0, -math.inf]}, "`weights` must be finite"),
    "a weight of text": ({"weights": [1.0, "2"]}, "`weights` must be finite numbers"),
    "an unknown kind": (
        {"combination_type": "mean"},
        "`combination_type` must be one of linear, cat, ties, dare_linear",
    ),
    "a kind with SVD": (
        {"combination_type": "ties_svd"},
        "`combination_type='ties_svd'` is for merges by SVD.*linear, cat",
    ),
    "LoRA's default": ({"combination_type": "svd", "svd_rank": 8}, "linear and cat are exact"),
    "a rank": ({"svd_rank": 8}, "`svd_rank=8` is for merges by SVD"),
    "no density": (
        {"combination_type": "ties"},
        r"`density` must be in \(0, 1\] with combination_type='ties', not None",
    ),
    "a density of 0": ({"combination_type": "dare_linear", "density": 0.0}, r"`density` must be in \(0, 1\]"),
    "a density above 1": ({"combination_type": "ties", "density": 1.5}, r"`density` must be in \(0, 1\].*not 1.5"),
    "a density of nothing": ({"density": 0.5}, "`density=0.5` is for kinds that prune, ties"),
    "an unknown election": ({"majority_sign_method": "most"}, "`majority_sign_method` must be total or frequency"),
    "a name in use": ({"adapter_name": "y"}, "`adapter_name='y'` is the name of an adapter.*`delete_adapter`"),
    "a name of torch's": ({"adapter_name": "double"}, "`adapter_name='double'` is an attribute of torch's modules"),
    "a dotted name": ({"adapter_name": "v1.0"}, "`adapter_name` must be a name without dots, not 'v1.0'"),
}


@pytest.fixture(scope="module", params=["sparsegrad", "graddrop"])
def unchanged(request, tmp_path_factory):
    return pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_change_nothing(unchanged, case):
    arguments, message = BAD[case]
    names = list(unchanged.state_dict())
    with pytest.raises(ValueError, match=message) as refused:
        unchanged.add_weighted_adapter(
            **{"adapters": ["x", "y"], "weights": [1, 1], "adapter_name": "new", **arguments}
        )
    assert "\n" not in str(refused.value)
    assert list(unchanged.peft_config) == ["x", "y"]
    assert list(unchanged.state_dict()) == names


@pytest.mark.parametrize("kind", ["linear", "ties", "dare_linear", "magnitude_prune"])
def test_different_bases_are_refused_but_for_cat(kind, tmp_path):
    model = pair("sparsegrad, other bases", tmp_path)
    density = None if kind == "linear" else 0.5
    with pytest.raises(ValueError, match=rf"`combination_type='{kind}'`.*'x' and 'y' have different.*type='cat'"):
        model.add_weighted_adapter(["x", "y"], WEIGHTS, "sum", kind, density=density)
    assert list(model.peft_config) == ["x", "y"]


def test_adapter_in_its_warm_up_is_refused(tmp_path):
    model = pair("sparsegrad", tmp_path)
    model.add_adapter("c", SparseGradConfig(density=0.05, warmup_steps=4))
    with pytest.raises(ValueError, match="the warm-up of the adapter 'c' has not finished"):
        model.add_weighted_adapter(["x", "c"], WEIGHTS, "sum", "cat")
    assert list(model.peft_config) == ["x", "y", "c"]


def test_bases_with_nothing_in_common_are_refused():
    settings = {"warmup_steps": 0, "target_modules": ["up_proj"], "init_weights": False}
    model = get_peft_model(tiny.llama(), SparseGradConfig(rank=(None, 8), **settings), adapter_name="x")
    model.add_adapter("y", SparseGradConfig(rank=(8, None), **settings))
    model.add_adapter("c", SparseGradConfig(basis="identity", **settings))
    for other, message in (
        ("y", "opposite sides at 'model.layers.0.mlp.up_proj'"),
        ("c", "basis='identity' and others"),
    ):
        with pytest.raises(ValueError, match=f"{message}.*`merge_adapter`"):
            model.add_weighted_adapter(["x", other], WEIGHTS, "sum", "cat")
    assert list(model.peft_config) == ["x", "y", "c"]


@pytest.mark.parametrize(
    "config", [SparseGradConfig(warmup_steps=0), GradDropConfig()], ids=["sparsegrad", "graddrop"]
)
def test_task_heads_are_refused(config):
    model = get_peft_model(tiny.llama(), replace(config, modules_to_save=["lm_head"]), adapter_name="x")
    with pytest.raises(ValueError, match=r"`adapters`: 'x' has `modules_to_save=\['lm_head'\]`, of which there is no"):
        model.add_weighted_adapter(["x"], [1.0], "sum")


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
