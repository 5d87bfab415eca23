"""Another forward pass for a module inside of its hooks, which may bring its parameters and take them away again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn


@contextlib.contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `module(...)` compute `forward(original, ...)` inside the block, `original` being its own forward pass."""
    own = vars(module).get("forward")  # of a module to which accelerate has added hooks
    module.forward = partial(forward, module.forward)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


class Calling(nn.Module):
    """A module that calls the forward pass of another without its hooks, for `torch.func.functional_call`.

    Args:
        base: The other module, whose parameters are named `base.…`.
        function: Its forward pass.
    """

    def __init__(self, base: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.base, self._function = base, function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)
