"""The question whether a backward pass is running, in which forward passes are computed again."""

from __future__ import annotations

import torch


def backward_id() -> int:
    """Return the number of the backward pass that is running in this thread, or -1 if none is."""
    return torch._C._current_graph_task_id()


def in_backward() -> bool:
    """Return whether a backward pass is running, so that a forward pass is one that checkpointing computes again."""
    return backward_id() != -1
