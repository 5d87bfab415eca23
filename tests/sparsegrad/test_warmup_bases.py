"""A warm-up's bases and supports are those of its gradients, and its report says what they hold."""

import dataclasses
import time

import pytest
import torch
from tiny import adapted, llama
from warmup_tools import BATCHES, layers

from peft_sparsegrad import WarmUpReport, warmup, warmup_report

FOR_BASES, FOR_SUPPORTS = slice(0, 2), slice(2, 4)


def gradients_of_the_weights(batches):
    """Literal ∂L/∂W of every adapted layer and batch, from a model whose weights are unfrozen."""
    model, found = llama(), {}
    for data in batches:
        model.zero_grad()
        model(**data).loss.backward()
        for name, parameter in model.named_parameters():
            if name.endswith(("up_proj.weight", "down_proj.weight")):
                found.setdefault(name.removesuffix(".weight"), []).append(parameter.grad.clone())
    return found


@pytest.mark.parametrize("role", ["up_proj", "down_proj"])
def test_basis_and_support_are_those_of_the_stacked_gradients(role):
    model = adapted(warmup_steps=4, rank=16)
    warmup(model, BATCHES, progress=False)
    gradients = {name: g for name, g in gradients_of_the_weights(BATCHES).items() if name.endswith(role)}
    stack = torch.stack(
        [g for per_layer in gradients.values() for g in per_layer[FOR_BASES]]
    ).double()  # (steps * blocks, out, in)
    left = torch.linalg.svd(stack.transpose(0, 1).flatten(1)).U[:, :16]
    right = torch.linalg.svd(stack.transpose(0, 2).flatten(1)).U[:, :16]
    for layer in (layer for layer in layers(model) if layer.adapter("default").plan.name.endswith(role)):
        adapter = layer.adapter("default")
        plan, group = adapter.plan, adapter.basis
        assert torch.allclose((group.V.double().T @ left).abs(), torch.eye(16, dtype=torch.float64), atol=1e-3)
        assert torch.allclose((group.U.double().T @ right).abs(), torch.eye(16, dtype=torch.float64), atol=1e-3)
        score = (group.V.T @ sum(gradients[plan.name][FOR_SUPPORTS]) @ group.U).abs().flatten()
        assert set(adapter.indices.tolist()) == set(score.topk(plan.k).indices.tolist())


def test_energy_sgradient_sums_squares():
    model = adapted(warmup_steps=4, rank=16, support_score="energy")
    warmup(model, BATCHES, progress=False)
    gradients = gradients_of_the_weights(BATCHES)
    for layer in layers(model):
        adapter = layer.adapter("default")
        plan, group = adapter.plan, adapter.basis
        score = sum((group.V.T @ g @ group.U).square() for g in gradients[plan.name][FOR_SUPPORTS]).flatten()
        assert set(adapter.indices.tolist()) == set(score.topk(plan.k).indices.tolist())


def test_report_tells_the_energy_captured_and_survives_json(tmp_path):
    model = adapted(warmup_steps=4, rank=16)
    report = warmup(model, BATCHES, progress=False)
    gradients, in_core, in_support = gradients_of_the_weights(BATCHES), {}, {}
    for adapter in (layer.adapter("default") for layer in layers(model)):
        name, group = adapter.plan.name, adapter.basis
        if name.endswith("up_proj"):
            first = gradients[name][FOR_SUPPORTS][0]
            squares, total = (group.V.T @ first @ group.U).square(), first.square().sum().item()
            in_core[name] = squares.sum().item() / total
            in_support[name] = squares.flatten()[adapter.indices].sum().item() / total
    found = next(group for group in report.groups if group.name == "model.layers.*.mlp.up_proj")
    assert found.core_of_layers == pytest.approx(in_core, rel=1e-4)
    assert found.support_of_layers == pytest.approx(in_support, rel=1e-4)
    assert len(in_core) == 3
    assert found.energy_in_core == sorted(found.core_of_layers.values())[1]
    assert found.energy_in_support == sorted(found.support_of_layers.values())[1]
    assert (found.chance_in_core, found.chance_in_support) == (16 * 16 / (64 * 32), found.num_values / (64 * 32))
    assert 0 < found.energy_in_support < found.energy_in_core < 1
    assert found.spectrum_in == sorted(found.spectrum_in, reverse=True)
    assert "model.layers.*.mlp.up_proj" in str(report)
    report.to_json(tmp_path / "report.json")
    assert WarmUpReport.from_json(tmp_path / "report.json") == report


def test_report_tells_what_the_warm_up_has_cost():
    model = adapted(warmup_steps=4)
    assert warmup_report(model) is None
    began = time.perf_counter()
    report = warmup(model, BATCHES, progress=False)
    assert warmup_report(model) is report
    assert report.passes == 4
    assert 0 < report.seconds < time.perf_counter() - began
    assert report.steps_worth > 4, "the observing comes on top"
    assert f"4 backward passes in {report.seconds:.1f} s, worth about {report.steps_worth:.0f} training" in str(report)
    assert str(dataclasses.replace(report, steps_worth=None)).startswith(
        f"4 backward passes in {report.seconds:.1f} s."
    )


@pytest.mark.parametrize("rank", ["auto", "narrower"])
@pytest.mark.parametrize("role", ["up_proj", "down_proj"])
def test_basis_and_support_are_those_of_the_one_side(role, rank):
    model = adapted(warmup_steps=4, slack=12, rank=rank)
    on_input = rank == "auto" or role == "up_proj"
    warmup(model, BATCHES, progress=False)
    gradients = {name: g for name, g in gradients_of_the_weights(BATCHES).items() if name.endswith(role)}
    stack = torch.stack([g for per_layer in gradients.values() for g in per_layer[FOR_BASES]]).double()
    unfolding = stack.transpose(0, 2).flatten(1) if on_input else stack.transpose(0, 1).flatten(1)
    for layer in (layer for layer in layers(model) if layer.adapter("default").plan.name.endswith(role)):
        adapter = layer.adapter("default")
        plan, group = adapter.plan, adapter.basis
        basis, other = (group.U, group.V) if on_input else (group.V, group.U)
        assert other is None
        rank = basis.shape[1]
        best = torch.linalg.svd(unfolding).U[:, :rank]
        assert torch.allclose((basis.double().T @ best).abs(), torch.eye(rank, dtype=torch.float64), atol=1e-3)
        summed = sum(gradients[plan.name][FOR_SUPPORTS])
        score = (summed @ basis if on_input else basis.T @ summed).abs().flatten()
        assert set(adapter.indices.tolist()) == set(score.topk(plan.k).indices.tolist())
