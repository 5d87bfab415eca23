"""The configured score chooses the first support and every renewal."""

from __future__ import annotations

import pytest
import torch
from paper_layer import random_orthogonal

from peft_sparsegrad import SparseGradConfig
from peft_sparsegrad.functional import SUPPORT_SCORES
from peft_sparsegrad.sparsegrad.adapter import LayerAdapter
from peft_sparsegrad.sparsegrad.basis import Basis
from peft_sparsegrad.sparsegrad.plan import plan_weight

TWINS = {  # from the gradients of all passes, (passes, r_out, r_in)
    "mean": lambda gradients: gradients.sum(0).abs(),
    "energy": lambda gradients: gradients.square().sum(0),
}


def test_every_score_has_a_twin():
    assert TWINS.keys() == SUPPORT_SCORES.keys()


@pytest.mark.parametrize("score", SUPPORT_SCORES)
def test_score_is_that_of_all_gradients(score):
    gradients = torch.randn(5, 3, 4, dtype=torch.float64)
    total = sum(SUPPORT_SCORES[score].of_pass(gradient) for gradient in gradients)
    torch.testing.assert_close(SUPPORT_SCORES[score].of_total(total), TWINS[score](gradients))


@pytest.mark.parametrize("score", SUPPORT_SCORES)
def test_renewal_goes_by_the_configured_score(score):
    """Against the gradient of the whole weight, over passes whose signs cancel for one score and not for the other."""
    config = SparseGradConfig(num_values=10, rank=(6, 8), warmup_steps=0, renewal_steps=4, support_score=score)
    adapter = LayerAdapter(plan_weight(config, "up", (6, 8)), torch.zeros(10), Basis((6, 8), (6, 8))).double()
    U, V = random_orthogonal(8, seed=0), random_orthogonal(6, seed=1)
    adapter.basis.fill(U, V)
    optimizer = torch.optim.SGD([adapter.values], lr=0.0)  # all values stay zero: the first three are dropped
    start, gradients = adapter.indices, []
    for step in range(4):
        x, dy = 1 + torch.randn(20, 8).double(), torch.randn(20, 6).double() + (-1) ** step * 3 * torch.arange(6)
        adapter.add_delta(torch.zeros(20, 6, dtype=torch.float64), x).backward(dy)
        gradients.append(V.T @ (dy.T @ x) @ U)
        optimizer.step()
        optimizer.zero_grad()
    ranked = TWINS[score](torch.stack(gradients)).flatten()
    new = [index for index in adapter.indices.tolist() if index not in start.tolist()]
    survivors = [index for index in start.tolist() if index in adapter.indices.tolist()]
    free = [index for index in range(48) if index not in survivors]
    expected = sorted(free, key=lambda index: -ranked[index])[: 10 - len(survivors)]
    assert sorted(expected) == sorted(new)
    other = TWINS[next(name for name in TWINS if name != score)](torch.stack(gradients)).flatten()
    assert set(expected) != set(sorted(free, key=lambda index: -other[index])[: len(expected)]), "the scores differ"
