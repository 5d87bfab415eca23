"""The number formats of a run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from benchmarks.compare.head import in_head

PRECISIONS = ("bf16", "tf32", "float32")


def hold(model: nn.Module, precision: str) -> nn.Module:
    """Cast the weights of a fresh model to the format that frozen ones are held in, the task head apart."""
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    if precision == "bf16":
        for name, parameter in model.named_parameters():
            if not in_head(name):
                parameter.data = parameter.data.bfloat16()
    return model


def computing(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context of forward passes."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()
