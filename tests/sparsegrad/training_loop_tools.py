"""The parts of a training loop of one's own, and what an adapter has seen of it."""

from __future__ import annotations

import torch
from tiny import batch

from peft_sparsegrad.sparsegrad.layer import layer_adapters


def trained(model) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def sgd(model, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(trained(model), lr=lr)


def supports(model) -> list[list[int]]:
    return [sorted(adapter.indices.tolist()) for adapter in layer_adapters(model, "default")]


def backward(model, number: int, factor: float = 1.0) -> None:
    (model(**batch(number)).loss * factor).backward()
