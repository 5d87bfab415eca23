"""`add_weighted_adapter` that prunes and elects signs, as LoRA does."""

import math

import pytest
import torch
from peft.utils import merge_utils
from weighted_adapter_tools import WEIGHTS, deltas, pair, sparsegrad_layers


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
