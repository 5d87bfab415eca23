"""The share of a step's gradient that the core and the support hold, which the callback logs."""

import pytest
import torch
from tiny import adapted, batch, llama

from peft_sparsegrad import warmup
from peft_sparsegrad.sparsegrad.energy_probe import EnergyProbe
from peft_sparsegrad.sparsegrad.layer import layer_adapters


def shares_of(adapter, gradient):
    """Literal shares of the energy of ∂L/∂W in the core and on the support."""
    U, V = adapter.basis.U, adapter.basis.V
    core = (V.T @ gradient if V is not None else gradient) @ (U if U is not None else torch.eye(gradient.shape[1]))
    total = gradient.square().sum()
    return (core.square().sum() / total).item(), (core.flatten()[adapter.indices].square().sum() / total).item()


@pytest.mark.parametrize("settings", [{}, {"rank": 16}], ids=str)
def test_shares_are_the_medians_over_the_layers_whatever_their_energy(settings):
    model = adapted(warmup_steps=4, **settings)
    warmup(model, [batch(seed) for seed in range(4)], progress=False)
    adapters, other = layer_adapters(model, "default"), llama()
    probe = EnergyProbe(adapters)
    for each in (model, other):
        each(**batch(9)).loss.backward()
    weights = dict(other.named_parameters())
    literal = [shares_of(each, weights[f"{each.plan.name}.weight"].grad) for each in adapters]
    found = probe.finish()
    in_core, in_support = (sorted(shares) for shares in zip(*literal, strict=True))
    middle = len(adapters) // 2
    assert len(adapters) == 6
    assert found["energy_in_core"] == pytest.approx((in_core[middle - 1] + in_core[middle]) / 2, rel=1e-4)
    assert found["energy_in_support"] == pytest.approx((in_support[middle - 1] + in_support[middle]) / 2, rel=1e-4)
    assert all(each.probe is None for each in adapters)


def test_without_a_backward_pass_there_is_nothing_to_tell():
    model = adapted(warmup_steps=2)
    warmup(model, [batch(0), batch(1)], progress=False)
    assert EnergyProbe(layer_adapters(model, "default")).finish() == {}
