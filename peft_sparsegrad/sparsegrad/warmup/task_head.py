"""The training of a new task head before the warm-up, as its first gradients say little about the task."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.optim import AdamW

from ...common.training.distributed import mean_over_ranks
from ..adapter import LayerAdapter


def settle_head(
    model: nn.Module, next_loss: Callable[[], torch.Tensor], steps: int, lr: float, adapters: list[LayerAdapter]
) -> None:
    """Train everything that requires a gradient except the SparseGrad values, with AdamW.

    Args:
        model: A model with a SparseGrad adapter.
        next_loss: Called without arguments; returns the loss of the next batch.
        steps: Number of steps, one batch each.
        lr: Learning rate.
        adapters: The SparseGrad adapter on each of its layers, which does not train.

    Raises:
        ValueError: If nothing else trains.
    """
    values = {adapter.values for adapter in adapters}
    head = [p for p in model.parameters() if p.requires_grad and p not in values]
    if not head:
        raise ValueError(
            "`head_steps` is set, but nothing besides SparseGrad trains: name the head in `modules_to_save`"
        )
    optimizer = AdamW(head, lr=lr)
    for _ in range(steps):
        gradients = torch.autograd.grad(next_loss(), head, allow_unused=True)
        for parameter, gradient in zip(head, gradients, strict=True):
            parameter.grad = None if gradient is None else mean_over_ranks(gradient)
        optimizer.step()
    optimizer.zero_grad()
