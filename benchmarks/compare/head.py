"""The task head: which parameters it has, and its training before a method is attached."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

import torch
from torch import nn

from experiments.optimizers import set_rate
from peft_sparsegrad.sparsegrad.warmup.passes import batch_loss
from peft_sparsegrad.sparsegrad.warmup.task_head import settle_head as settle_trained

from .task import Row

HEADS = ("pooler", "classifier")  # of little use before training: MiniLM comes with a pooler that nobody trained
LEARNING_RATE = 1e-3


def head_modules(model: nn.Module) -> list[str]:
    """Names of the modules of the task head."""
    return [name for name, _ in model.named_modules() if name.rpartition(".")[2] in HEADS]


def in_head(parameter_name: str) -> bool:
    """Return whether the parameter belongs to the task head."""
    return not set(HEADS).isdisjoint(parameter_name.split("."))


def head_batches(chosen: list[Row], others: list[Row], steps: int, batch_size: int, seed: int) -> Iterator[list[Row]]:
    """Rows for the head's training, batch by batch.

    Args:
        chosen: The rows that the method will be trained on.
        others: The other rows. They are used where there are enough for all steps, and all rows where there are not.
    """
    rows = list(others)
    if len(others) < steps * batch_size:
        rows += chosen
        random.Random(seed).shuffle(rows)
    endless = itertools.cycle(rows)
    return (list(itertools.islice(endless, batch_size)) for _ in range(steps))


def settle_head(
    model: nn.Module, batches: Iterator[list[Row]], collate: Callable[[list[Row]], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Train the task head alone with AdamW, one step for each batch. Returns a copy of its parameters.

    A new head's first gradients say little about the task: without this, the methods that look at the first
    gradients would be compared by what they make of noise.
    """
    device = next(model.parameters()).device
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(in_head(name))
    collated = [{key: tensor.to(device) for key, tensor in collate(rows).items()} for rows in batches]
    losses = (batch_loss(model, batch, index) for index, batch in enumerate(collated))
    settle_trained(model, lambda: next(losses), len(collated), LEARNING_RATE, adapters=[])
    model.requires_grad_(True)
    return {name: p.detach().clone() for name, p in model.named_parameters() if in_head(name)}


def train_head_apart(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Put the head's parameters into groups of their own, with the learning rate that has settled the head.

    So the learning rate that is searched for a method is that of its own values.
    """
    set_rate(optimizer, [parameter for name, parameter in model.named_parameters() if in_head(name)], LEARNING_RATE)


def count_trained(model: nn.Module) -> dict[str, int]:
    """Count the values that train in the task head and elsewhere."""
    counts = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        counts[in_head(name)] += parameter.numel() * parameter.requires_grad
    return {"trained_parameters": counts[False], "trained_head_parameters": counts[True]}
