"""Layers of each kind with two masked deltas, and what autograd makes of the same layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch.nn import functional as F

from peft_sparsegrad.functional.masked_layer import Conv2dOperation, Delta, LinearOperation, masked_layer

EXACT = {"rtol": 1e-12, "atol": 1e-12}
GROUPED = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2}


def conv(stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1) -> tuple[Conv2dOperation, Callable]:
    def plain(x, weight, bias):
        return F.conv2d(x, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups)

    return Conv2dOperation(stride, padding, dilation, groups), plain


def conv1d_layout(x, weight, bias):
    """That of transformers.pytorch_utils.Conv1D: weight (in, out)."""
    return x @ weight if bias is None else x @ weight + bias


LINEAR = (LinearOperation(), F.linear)
TRANSPOSED = (LinearOperation(transposed=True), conv1d_layout)
# name: ((operation, the same through autograd), shape of x, of the weight, outputs)
CASES = {
    "linear": (LINEAR, (5, 7), (6, 7), 6),
    "linear, sequences": (LINEAR, (2, 3, 7), (6, 7), 6),
    "linear, one token": (LINEAR, (1, 7), (6, 7), 6),
    "linear, a vector": (LINEAR, (7,), (6, 7), 6),
    "linear, no tokens": (LINEAR, (0, 7), (6, 7), 6),
    "linear, one output": (LINEAR, (2, 3, 7), (1, 7), 1),
    "transposed": (TRANSPOSED, (5, 7), (7, 6), 6),
    "transposed, sequences": (TRANSPOSED, (2, 3, 7), (7, 6), 6),
    "transposed, square": (TRANSPOSED, (4, 6), (6, 6), 6),
    "conv": (conv(), (2, 3, 6, 5), (4, 3, 3, 3), 4),
    "conv, 1x1": (conv(), (2, 3, 4, 4), (4, 3, 1, 1), 4),
    "conv, stride": (conv(stride=(2, 3)), (2, 3, 8, 9), (4, 3, 3, 2), 4),
    "conv, padding": (conv(padding=(1, 2)), (2, 3, 4, 5), (4, 3, 3, 3), 4),
    "conv, dilation": (conv(dilation=(2, 3)), (2, 3, 8, 9), (4, 3, 3, 2), 4),
    "conv, groups": (conv(groups=2), (2, 4, 5, 5), (6, 2, 3, 3), 6),
    "conv, depthwise": (conv(groups=4), (2, 4, 5, 5), (4, 1, 3, 3), 4),
    "conv, all": (conv(**GROUPED), (2, 4, 7, 8), (6, 2, 3, 3), 6),
}
FEW = ["linear, sequences", "transposed, sequences", "conv, all"]
ALL_CASES = pytest.mark.parametrize("case", list(CASES))
FEW_CASES = pytest.mark.parametrize("case", FEW)


@dataclass
class LiteralMask:
    """Multiplies by a stored mask, in place, and keeps count."""

    factors: torch.Tensor
    seen: list[torch.Tensor] = field(default_factory=list)

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        self.seen.append(gradient)
        return gradient.mul_(self.factors)


class Problem:
    """Random operands in float64, two deltas for the weight and two for the bias, each with a mask of its own."""

    def __init__(self, case: str) -> None:
        (self.operation, self.plain), x_shape, weight_shape, outputs = CASES[case]
        generator = torch.Generator().manual_seed(0)

        def randn(*size: int) -> torch.Tensor:
            return torch.randn(size, dtype=torch.float64, generator=generator)

        def delta(*size: int) -> Delta:
            factors = torch.bernoulli(torch.full(size, 0.5, dtype=torch.float64), generator=generator) * 2
            return Delta(randn(*size).requires_grad_(), LiteralMask(factors))

        self.x, self.weight, self.bias = randn(*x_shape).requires_grad_(), randn(*weight_shape), randn(outputs)
        self.weight_deltas = [delta(*weight_shape), delta(*weight_shape)]
        self.bias_deltas = [delta(outputs), delta(outputs)]
        self.dy = randn(*self.ours().shape)

    @property
    def deltas(self) -> list[Delta]:
        return [*self.weight_deltas, *self.bias_deltas]

    def ours(self) -> torch.Tensor:
        return masked_layer(self.operation, self.x, self.weight, self.bias, self.weight_deltas, self.bias_deltas)

    def naive(self) -> torch.Tensor:
        weight, bias = self.weight, self.bias
        for delta in self.weight_deltas:
            weight = delta.value if weight is None else weight + delta.value
        for delta in self.bias_deltas:
            bias = delta.value if bias is None else bias + delta.value
        return self.plain(self.x, weight, bias)

    def gradients(self, output: torch.Tensor) -> list[torch.Tensor | None]:
        """Of x and of each delta, as they come."""
        tensors = [self.x, *(delta.value for delta in self.deltas)]
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        found = iter(torch.autograd.grad(output, wanted, self.dy, allow_unused=True))
        return [next(found) if tensor.requires_grad else None for tensor in tensors]

    def expected(self) -> list[torch.Tensor | None]:
        """Through autograd, masked afterwards."""
        dx, *unmasked = self.gradients(self.naive())
        masked = zip(self.deltas, unmasked, strict=True)
        return [dx, *(None if g is None else g * delta.mask.factors for delta, g in masked)]


def assert_same(tensors, references, **tolerance) -> None:
    for tensor, reference in zip(tensors, references, strict=True):
        assert (tensor is None) == (reference is None)
        if tensor is not None:
            torch.testing.assert_close(tensor, reference, **(tolerance or EXACT))


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def kept_storages(forward: Callable[[], torch.Tensor]) -> list[int]:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(storage(t)) or t, lambda t: t):
        forward()
    return kept
