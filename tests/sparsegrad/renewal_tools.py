"""Supports and counted steps of a model, steps of training, and a small network in float64."""

from __future__ import annotations

import itertools

import torch
from paper_layer import random_orthogonal
from peft import get_peft_model
from tiny import batch
from torch import nn

from peft_sparsegrad import SparseGradConfig, SparseGradLinear


def layers(model) -> list[SparseGradLinear]:
    return [module for module in model.modules() if isinstance(module, SparseGradLinear)]


def supports(model, name: str = "default") -> list[list[int]]:
    return [layer.adapter(name).indices.tolist() for layer in layers(model)]


def counted(model, name: str = "default") -> set[int]:
    return {layer.adapter(name).num_steps for layer in layers(model)}


def trained_parameters(model) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(model, lr: float = 0.02, **settings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained_parameters(model), lr=lr, **settings)


def step(model, optimizer, number: int = 0) -> float:
    loss = model(**batch(number % 4)).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def run_of(model, steps: int = 9, **settings):
    optimizer = adamw(model, **settings)
    return [step(model, optimizer, number) for number in range(steps)]


SIZES, K, FIRST = [6, 10, 10, 3], 12, 5


def mlp(**settings):
    """A PEFT model in float64 with fixed random bases; one-sided on (10, 6), (10, 10) and (3, 10) by default."""
    torch.manual_seed(0)
    modules = [module for i, o in itertools.pairwise(SIZES) for module in (nn.Linear(i, o), nn.Tanh())][:-1]
    defaults = {"num_values": K, "slack": 3, "warmup_steps": 0, "renewal_steps": FIRST}
    config = SparseGradConfig(target_modules=["0", "2", "4"], **{**defaults, **settings})
    model = get_peft_model(nn.Sequential(*modules).double(), config).double()
    for layer in layers(model):
        group = layer.adapter("default").basis
        n_out, n_in = group.weight_shape
        U = None if group.U is None else random_orthogonal(n_in, seed=1)[:, : group.U.shape[1]]
        V = None if group.V is None else random_orthogonal(n_out, seed=2)[:, : group.V.shape[1]]
        group.fill(U, V)
    return model


def data(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number % 7)
    x = torch.randn(9, SIZES[0], dtype=torch.float64, generator=generator)
    return x, torch.randn(9, SIZES[-1], dtype=torch.float64, generator=generator)
