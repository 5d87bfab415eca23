"""The part of a GradDrop adapter that is on one module."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from ..common.kept_buffers import KeptBuffers
from ..common.scaling import ScaledPart


class Deltas(KeptBuffers, ScaledPart):
    """The trained deltas of one adapter on one module.

    They are in a module of their own so that their names contain the adapter's name and do not end in it. TRL finds by
    that what it copies into a reference adapter.

    Args:
        weight: Initial delta of the weight, in the weight's shape and layout.
        bias: Initial delta of the bias, or None if the module has none.

    Attributes:
        weight_delta: Trained delta of the weight.
        bias_delta: Trained delta of the bias, or None.
        num_steps: Number of optimizer steps taken, int64 (1,), see `StepCount`; on other layers than the adapter's
            first None.
    """

    num_steps: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight_delta = nn.Parameter(weight)
        self.register_parameter("bias_delta", None if bias is None else nn.Parameter(bias))
        self.register_buffer("num_steps", None)

    def of(self, kind: str) -> nn.Parameter | None:
        """Return the delta of the `"weight"` or of the `"bias"`."""
        return cast("nn.Parameter | None", getattr(self, f"{kind}_delta"))
