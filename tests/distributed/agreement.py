"""Ranks that differ: in where they are, in their batches, in the layers that they run."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from peft_sparsegrad.common.distributed import agree, numbers_of_ranks, refuse_join

CPU = torch.device("cpu")


def rank() -> int:
    return int(os.environ["RANK"])


def agreement(points: list[str], ok: list[bool]) -> bool:
    return agree(points[rank()], CPU, "do as the others", ok[rank()])


def numbers() -> list[int]:
    return numbers_of_ranks(rank() + 5, CPU)


class RefusesJoin(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        refuse_join("the test")
        return super().forward(x)


def passes_of_ddp(joined: bool | None) -> None:
    """One forward and backward pass; None for no `join` context, False for one that is disabled."""
    model: Any = DistributedDataParallel(RefusesJoin(2, 2))
    if joined is None:
        model(torch.ones(1, 2)).sum().backward()
        return
    with Join([model], enable=joined):
        model(torch.ones(1, 2)).sum().backward()
