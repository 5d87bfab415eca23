"""What `torch.compile` makes of a training run: graphs, breaks between them, and graphs made anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from peft import PeftConfig, get_peft_model
from tiny import batch, llama
from torch import nn
from torch._dynamo.utils import counters


class Compiled(NamedTuple):
    """The work of the compiler in a training run, and what the run has come to.

    Attributes:
        graphs: Number of graphs that were made.
        graph_breaks: Number of places where a graph ends because the compiler cannot go on.
        graphs_in_last_step: Number of the graphs that were made in the last step, 0 in a run that has settled.
        losses: Loss of each step.
    """

    graphs: int
    graph_breaks: int
    graphs_in_last_step: int
    losses: list[float]


def train_compiled(
    model: nn.Module, steps: int, before_step: Callable[[int], None] | None = None, backend: str = "aot_eager"
) -> Compiled:
    """Train a language model for some steps in compiled form, from an empty cache of the compiler on.

    Args:
        model: The model; compile counts are those of this run alone.
        steps: Number of optimizer steps, of AdamW.
        before_step: Called with the number of each step before its forward pass.
        backend: Backend of `torch.compile`.
    """
    torch.compiler.reset()
    counters.clear()
    made, losses = [0], []
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(steps):
        if before_step is not None:
            before_step(step)
        loss = compiled(**batch(step % 4)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        made.append(counters["stats"]["unique_graphs"])
    return Compiled(made[-1], sum(counters["graph_break"].values()), made[-1] - made[-2], losses)


def compile_counts(config: PeftConfig, steps: int = 3, blocks: int = 2) -> Compiled:
    """Return what `torch.compile` makes of training a tiny LLaMA with an adapter: a row of a table of features."""
    return train_compiled(get_peft_model(llama(num_hidden_layers=blocks), config), steps)
