"""Our layer against the paper's, in float64: outputs, input gradients, and 50 steps of training."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from paper_layer import PaperAdam, PaperLinear, random_orthogonal
from peft import get_peft_model
from torch import nn

from peft_sparsegrad import SparseGradAdam, SparseGradConfig, create_sparsegrad_optimizer

SIZES = [6, 10, 10, 3]
K = 9
LAYERS = ["0", "2", "4"]
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def mlp(bias: bool) -> nn.Sequential:
    """Three linear layers with tanh between them."""
    torch.manual_seed(0)
    pairs = itertools.pairwise(SIZES)
    layers = [module for i, o in pairs for module in (nn.Linear(i, o, bias=bias), nn.Tanh())][:-1]
    return nn.Sequential(*layers).double()


def random_support(num_entries: int, seed: int) -> torch.Tensor:
    return torch.randperm(num_entries, generator=torch.Generator().manual_seed(seed))[:K].sort().values


def both(support: str, bias: bool, config=None, **settings) -> tuple[nn.Module, nn.Sequential]:
    """A PEFT model and its twin, with the same bases and supports; the static supports lie within the core."""
    twin = mlp(bias)
    if config is None:
        settings = {"rank": "full", "warmup_steps": 0, "renewal_steps": 0, **settings}
        config = SparseGradConfig(target_modules=LAYERS, num_values=K, support=support, **settings)
    model = get_peft_model(copy.deepcopy(twin), config).double()
    for name in LAYERS:
        linear, layer = twin[int(name)], model.base_model.model[int(name)]
        own_adapter = layer.adapter("default")
        plan, group = own_adapter.plan, own_adapter.basis
        (r_out, r_in), (n_out, n_in) = plan.core_shape, plan.weight_shape
        U, V = random_orthogonal(n_in, seed=1), random_orthogonal(n_out, seed=2)
        group.fill(U[:, :r_in], V[:, :r_out])
        indices = None
        if support == "static":
            core_indices = random_support(r_out * r_in, seed=int(name))
            own_adapter.settle(core_indices)
            indices = core_indices // r_in * n_in + core_indices % r_in
        twin[int(name)] = PaperLinear(linear, U, V, indices, K)
    return model, twin


def inputs_and_targets(shape: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, SIZES[0], dtype=torch.float64, generator=generator)
    return x, torch.randn(*shape, SIZES[-1], dtype=torch.float64, generator=generator)


def forward_and_backward(model: nn.Module, x: torch.Tensor, target: torch.Tensor):
    """Output and input gradient of one pass; the parameters' gradients are left on them."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    (y - target).square().sum().backward()
    return y.detach(), x.grad


def assert_same_training(model, twin, optimizer, shape, steps=50):
    paper = [module for module in twin if isinstance(module, PaperLinear)]
    paper_optimizer = PaperAdam([layer.weight for layer in paper], lr=0.01)
    start = [layer.weight.detach().clone() for layer in paper]
    for step in range(steps):
        x, target = inputs_and_targets(shape, seed=step)
        results = [forward_and_backward(m, x, target) for m in (model, twin)]
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, **EXACT)
        for layer in paper:
            layer.mask_gradient()
        optimizer.step()
        paper_optimizer.step()
    for name, layer, before in zip(LAYERS, paper, start, strict=True):
        ours = model.base_model.model[int(name)]
        torch.testing.assert_close(ours.weight + ours.get_delta_weight("default"), layer.original_weight(), **EXACT)
        assert (layer.weight - before).abs().max() > 0.01, "nothing was trained"
        assert torch.count_nonzero(layer.weight - before) >= K


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (3, 4)])
def test_static_training_is_the_papers(bias, shape):
    model, twin = both("static", bias)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    assert_same_training(model, twin, optimizer, shape)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (3, 4)])
def test_dynamic_training_is_the_papers(bias, shape):
    model, twin = both("dynamic", bias)
    optimizer = SparseGradAdam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    assert_same_training(model, twin, optimizer, shape)


def test_the_variant_of_that_name_is_the_papers():
    config = SparseGradConfig.from_variant("paper", target_modules=LAYERS, num_values=K, warmup_steps=0)
    model, twin = both("dynamic", bias=True, config=config)
    assert_same_training(model, twin, create_sparsegrad_optimizer(model, lr=0.01), (3, 4))


@pytest.mark.parametrize("rank", [5, (3, 6)])
def test_leading_columns_are_all_that_a_support_within_them_needs(rank):
    """A rank below full is the paper's layer with the support in the core's corner."""
    model, twin = both("static", bias=True, rank=rank)
    assert_same_training(model, twin, create_sparsegrad_optimizer(model, lr=0.01), (7,))


def test_gradient_of_the_values_is_that_of_the_rotated_weight():
    """The whole core's gradient before any masking: k is every entry."""
    linear = nn.Linear(6, 4).double()
    config = SparseGradConfig(target_modules=["0"], rank="full", density=1.0, support="dynamic", warmup_steps=0)
    model = get_peft_model(nn.Sequential(copy.deepcopy(linear)), config).double()
    layer = model.base_model.model[0]
    U, V = random_orthogonal(6, seed=1), random_orthogonal(4, seed=2)
    layer.adapter("default").basis.fill(U, V)
    twin = PaperLinear(linear, U, V)
    x = torch.randn(5, 6, dtype=torch.float64)
    for module in (model, twin):
        module(x).pow(3).sum().backward()
    gradient = layer.adapter("default").values.grad.view(4, 6)
    torch.testing.assert_close(gradient, twin.weight.grad, **EXACT)
