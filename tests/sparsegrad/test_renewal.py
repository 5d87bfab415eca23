"""Growing back: a support follows the gradient while it trains, entry by entry as in a slow twin."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from renewal_tools import adamw, data, layers, mlp, run_of, step, supports, trained_parameters
from tiny import adapted

EXACT = {"rtol": 1e-9, "atol": 1e-9}
BETAS, EPS = (0.9, 0.999), 1e-8


class Twin:
    """Layers y = W x + b + V S Uᵀ x with tanh between them, whose dense cores S train where their supports are."""

    def __init__(self, model, lr: float, weight_decay: float) -> None:
        self.lr, self.weight_decay, self.steps = lr, weight_decay, 0
        self.linears, self.bases, self.cores, self.values, self.m, self.v, self.sums = [], [], [], [], [], [], []
        for layer in layers(model):
            adapter = layer.adapter("default")
            plan, values, group = adapter.plan, adapter.values, adapter.basis
            n_out, n_in = plan.weight_shape
            U = torch.eye(n_in, dtype=torch.float64) if group.U is None else group.U
            V = torch.eye(n_out, dtype=torch.float64) if group.V is None else group.V
            self.linears.append(copy.deepcopy(layer.base_layer))
            self.bases.append((U.clone(), V.clone()))
            self.values.append(dict(zip(adapter.indices.tolist(), values.tolist(), strict=True)))
            self.m.append(dict.fromkeys(self.values[-1], 0.0))
            self.v.append(dict.fromkeys(self.values[-1], 0.0))
            self.sums.append([0.0] * plan.num_entries)

    def loss(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.cores = []
        for i, (linear, (U, V)) in enumerate(zip(self.linears, self.bases, strict=True)):
            core = torch.zeros(V.shape[1] * U.shape[1], dtype=torch.float64)
            for index, value in self.values[i].items():
                core[index] = value
            self.cores.append(core.view(V.shape[1], U.shape[1]).requires_grad_())
            x = linear(x if i == 0 else torch.tanh(x)) + (x if i == 0 else torch.tanh(x)) @ U @ self.cores[i].T @ V.T
        return (x - target).square().mean()

    def train(self, x: torch.Tensor, target: torch.Tensor) -> float:
        loss = self.loss(x, target)
        gradients = torch.autograd.grad(loss, self.cores)
        self.steps += 1
        for i, gradient in enumerate(gradient.flatten().tolist() for gradient in gradients):
            self.sums[i] = [a + b for a, b in zip(self.sums[i], gradient, strict=True)]
            for index in self.values[i]:
                self._adam(i, index, gradient[index])
            if self.steps in (5, 10, 20, 40):
                self._renew(i)
        return loss.item()

    def _adam(self, i: int, index: int, g: float) -> None:
        m = self.m[i][index] = BETAS[0] * self.m[i][index] + (1 - BETAS[0]) * g
        v = self.v[i][index] = BETAS[1] * self.v[i][index] + (1 - BETAS[1]) * g * g
        m_hat, v_hat = m / (1 - BETAS[0] ** self.steps), v / (1 - BETAS[1] ** self.steps)
        decayed = self.values[i][index] * (1 - self.lr * self.weight_decay)
        self.values[i][index] = decayed - self.lr * m_hat / (math.sqrt(v_hat) + EPS)

    def _renew(self, i: int) -> None:
        """30% of 12 values, rounded down, are 3."""
        values = self.values[i]
        survivors = sorted(values, key=lambda index: abs(values[index]))[3:]
        free = [index for index in range(len(self.sums[i])) if index not in survivors]
        new = [*survivors, *sorted(free, key=lambda index: -abs(self.sums[i][index]))[:3]]
        fills = [0.0]
        for moments in (self.m[i], self.v[i]):
            nowhere_negative = all(moment >= 0 for moment in moments.values())
            fills.append(sum(moments.values()) / len(moments) if nowhere_negative else 0.0)
        old = (values, self.m[i], self.v[i])
        # an entry that was dropped and is chosen again has not been away
        moved = [{index: at.get(index, fill) for index in sorted(new)} for at, fill in zip(old, fills, strict=True)]
        self.values[i], self.m[i], self.v[i] = moved
        self.sums[i] = [0.0] * len(self.sums[i])


def mlp_step(model, optimizer, number: int) -> float:
    x, target = data(number)
    loss = (model(x) - target).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("settings", [{}, {"rank": "full"}, {"rank": (None, 5)}, {"init_weights": False}], ids=str)
def test_training_is_the_slow_twins(settings, weight_decay):
    model = mlp(**settings)
    twin, optimizer = Twin(model, 0.05, weight_decay), adamw(model, 0.05, weight_decay=weight_decay)
    renewals, before = [], supports(model)
    for number in range(60):
        assert mlp_step(model, optimizer, number) == pytest.approx(twin.train(*data(number)), rel=1e-9)
        for layer, values, m, v in zip(layers(model), twin.values, twin.m, twin.v, strict=True):
            adapter = layer.adapter("default")
            parameter = adapter.values
            assert sorted(adapter.indices.tolist()) == list(values)
            for ours, theirs in (
                (parameter, values),
                (optimizer.state[parameter]["exp_avg"], m),
                (optimizer.state[parameter]["exp_avg_sq"], v),
            ):
                expected = torch.tensor([theirs[index] for index in adapter.indices.tolist()], dtype=torch.float64)
                torch.testing.assert_close(ours.detach(), expected, **EXACT)
        if supports(model) != before:
            renewals.append(number + 1)
        before = supports(model)
        summed = {layer.adapter("default").gradient_sum is not None for layer in layers(model)}
        assert summed == {number + 1 not in (5, 10, 20, 40)}, "every layer is renewed, and only then"
    assert renewals == [5, 10, 20, 40]


def test_values_without_a_step_size_keep_their_places_only_if_they_are_large():
    """With a learning rate of 0 the values stay what they are, and the smallest still give way to zeros."""
    model = adapted(renewal_steps=3, init_weights=False)
    values = [layer.adapter("default").values.tolist() for layer in layers(model)]
    before = list(zip(values, supports(model), strict=True))
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=0.0)
    for number in range(3):
        step(model, optimizer, number)
    for layer, (values, old), new in zip(layers(model), before, supports(model), strict=True):
        at = dict(zip(old, values, strict=True))
        assert new != old
        assert layer.adapter("default").values.tolist() == [at.get(index, 0.0) for index in new]


def test_survivors_keep_their_slots():
    model = adapted(renewal_steps=3)
    before = supports(model)
    run_of(model, steps=3)
    for old, new in zip(before, supports(model), strict=True):
        kept = set(old) & set(new)
        assert len(kept) < len(old)
        assert all(new[slot] == index for slot, index in enumerate(old) if index in kept)
