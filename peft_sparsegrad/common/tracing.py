"""Whether a forward pass is recorded as a program for other places, as `torch.export` and `torch.jit.trace` do."""

from __future__ import annotations

import torch


def is_exporting() -> bool:
    """Return whether a pass is recorded as a program that computes outputs and does not train."""
    exports = getattr(torch.compiler, "is_exporting", None)  # new in torch 2.7
    if exports is not None and exports():
        return True
    return torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def has_stand_ins() -> bool:
    """Return whether the tensors of the modules are for the moment others, without contents, as in most exports."""
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
