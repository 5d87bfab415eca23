"""The warning that names adapted layers to which no gradient came, so that they would be saved as they began."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from ..delta_layer import DeltaLayer
from .backward import in_backward
from .optimizer_watcher import OptimizerStep, forget, watch
from .zero import is_managed

_NAMED = 5  # layers that the warning names


class FirstGradients:
    """Observer of the first optimizer step after a backward pass, which then looks at no further step.

    A layer that is frozen in that step is looked at when it first trains. An engine that takes the gradients away
    from the parameters, as DeepSpeed does, is not looked at.

    Args:
        title: Name of the method.
        adapter_name: Name of the adapter.
        layers: The adapted layers by their names in the base model.
    """

    def __init__(self, title: str, adapter_name: str, layers: dict[str, DeltaLayer]) -> None:
        self._title, self._adapter_name, self._waiting = title, adapter_name, layers
        watch(self)

    def before_step(self, step: OptimizerStep) -> Callable[[], None] | None:
        """Look at the gradients of the layers that the optimizer holds."""
        if in_backward():  # of a loop with an optimizer for each parameter: the other gradients are still to come
            return None
        self._look_at([name for name, layer in self._waiting.items() if self._is_held(layer, step)])
        return None

    def _is_held(self, layer: DeltaLayer, step: OptimizerStep) -> bool:
        parameters = self._parameters(layer)
        return bool(parameters) and all(step.updates(p) and p.numel() and not is_managed(p) for p in parameters)

    def _parameters(self, layer: DeltaLayer) -> list[nn.Parameter]:
        adapters = getattr(layer, layer.adapter_layer_names[0])
        return list(adapters[self._adapter_name].parameters()) if layer.has_adapter(self._adapter_name) else []

    def _look_at(self, names: list[str]) -> None:
        idle = [name for name in names if all(p.grad is None for p in self._parameters(self._waiting[name]))]
        if len(idle) == len(names):  # there was no backward pass yet
            return
        idle = [name for name in idle if not self._waiting[name].is_frozen(self._adapter_name)]
        reached = [name for name in names if any(p.grad is not None for p in self._parameters(self._waiting[name]))]
        for name in idle + reached:
            del self._waiting[name]
        if not self._waiting:
            forget(self)
        if idle:
            more = f" and {len(idle) - _NAMED} more" if len(idle) > _NAMED else ""
            warnings.warn(
                f"{self._title}: {len(idle)} of {len(idle) + len(reached)} adapted layers received no gradient in the "
                f"first backward pass: {', '.join(map(repr, idle[:_NAMED]))}{more}. Either they are no part of the "
                "loss, or these batches did not reach them; name those that are to stay as they are in "
                "`exclude_modules`.",
                stacklevel=2,
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._waiting:
            watch(self)  # a copy trains by itself
