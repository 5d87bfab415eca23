"""What the tests of GradDrop have in common."""

from __future__ import annotations

import torch
from peft import get_peft_model
from tiny import bert, llama
from torch import nn

from peft_sparsegrad import GradDropConfig
from peft_sparsegrad.graddrop import GradDropLayer

LAYERWISE_SETS = {"granularity": "layer", "interval": "epoch", "selection": "without-replacement"}


def graddrop_layers(model) -> dict[str, GradDropLayer]:
    """Name in the base model to layer."""
    return {layer.graddrop_name: layer for layer in model.modules() if isinstance(layer, GradDropLayer)}


def masks_of(model, adapter: str = "default"):
    return next(iter(graddrop_layers(model).values())).graddrop_sampler[adapter]


def deltas(model, adapter: str = "default") -> dict[str, nn.Parameter]:
    """Name of the parameter in the base model to its delta."""
    return {
        f"{name}.{kind.removesuffix('_delta')}": delta
        for name, layer in graddrop_layers(model).items()
        if layer.has_adapter(adapter)
        for kind, delta in layer.deltas(adapter).named_parameters()
    }


def dropped(model=None, variant: str | None = None, **settings):
    """A PEFT model with a GradDrop adapter."""
    config = GradDropConfig.from_variant(variant, **settings) if variant else GradDropConfig(**settings)
    return get_peft_model(llama() if model is None else model, config)


class Block(nn.Module):
    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.up = nn.Linear(size, 2 * size)
        self.down = nn.Linear(2 * size, size)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Tower(nn.Module):
    """A small residual network, where every parameter has a gradient without zeros."""

    def __init__(self, num_blocks: int = 3, size: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Linear(size, size)
        self.layers = nn.ModuleList([Block(size) for _ in range(num_blocks)])
        self.head = nn.Linear(size, 4)

    def forward(self, x):
        x = self.embedding(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def tower(num_blocks: int = 3, size: int = 8, dtype: torch.dtype = torch.float64) -> Tower:
    torch.manual_seed(0)
    return Tower(num_blocks, size).to(dtype)


def loss_of(model, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A loss that differs from seed to seed."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 8, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randn(6, 4, generator=generator, dtype=torch.float64).to(dtype)
    return (model(x) - y).square().sum()


def sgd(model, lr: float = 0.01, **settings) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, **settings)


def adamw(model, lr: float = 0.01, **settings) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, **settings)


def step(model, optimizer, seed: int = 0) -> None:
    loss_of(model, seed).backward()
    optimizer.step()
    optimizer.zero_grad()


def moved_in_a_step(model, optimizer, seed=0) -> dict[str, torch.Tensor]:
    """The entries that a step moves: under SGD those that are not masked, for no gradient of a `tower` is zero."""
    before = {name: delta.detach().clone() for name, delta in deltas(model).items()}
    step(model, optimizer, seed)
    return {name: delta.detach() != before[name] for name, delta in deltas(model).items()}


def kept_now(masks, parameters) -> dict[str, torch.Tensor]:
    """Name to the entries that the masks of this step keep."""
    return {
        name: masks.mask(name, block).keep(parameter.shape, parameter.device)
        for name, (parameter, block) in parameters.items()
    }


__all__ = [
    "LAYERWISE_SETS",
    "adamw",
    "bert",
    "deltas",
    "dropped",
    "graddrop_layers",
    "kept_now",
    "llama",
    "loss_of",
    "masks_of",
    "moved_in_a_step",
    "sgd",
    "step",
    "tower",
]
