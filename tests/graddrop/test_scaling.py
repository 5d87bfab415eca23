"""What the method card says about the factor 1 / (1 − p): Adam cancels it, SGD does not, clipping sees it."""

import pytest
import torch
from peft import get_peft_model
from tiny import batch, llama

from peft_sparsegrad import GradDrop, GradDropConfig


def adapted(**settings):
    return get_peft_model(llama(), GradDropConfig(task_type="CAUSAL_LM", **settings))


def trained_deltas(make_optimizer, **settings):
    model = adapted(**settings)
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
    graddrop = GradDrop(model, num_epochs=5)
    for step in range(50):
        graddrop.set_epoch(step // 10)
        model(**batch(step % 4)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.mark.parametrize(
    ("make_optimizer", "settings", "least", "most"),
    [
        (adam, {"p": 0.2}, 0, 1e-3),
        (adam, {"p": 0.5}, 0, 1e-3),
        (adam, {"p": 0.9, "schedule": "linear"}, 0.2, 1),
        (sgd, {"p": 0.2}, 0.1, 1),
    ],
)
def test_what_the_factor_changes(make_optimizer, settings, least, most):
    with_it = trained_deltas(make_optimizer, scale=True, **settings)
    without = trained_deltas(make_optimizer, scale=False, **settings)
    assert least <= (with_it - without).norm() / without.norm() <= most


@pytest.mark.parametrize("p", [0.2, 0.9])
def test_norm_that_clipping_sees(p):
    def norm(**settings):
        model = adapted(**settings)
        model(**batch()).loss.backward()
        return torch.nn.utils.get_total_norm([q.grad for q in model.parameters() if q.grad is not None])

    ratio = sum(norm(p=p, seed=seed) for seed in range(10)) / 10 / norm(p=0.0)
    assert ratio == pytest.approx((1 - p) ** -0.5, rel=0.05)
