"""A module some of whose parameters have adapters, such as the experts of a mixture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from .forward_replaced import Calling, forward_replaced
from .placement import is_split_by_zero

if TYPE_CHECKING:
    from .parameter_layer import ParameterLayer


class AdaptedParameters(nn.Module):
    """A frozen module that computes with the sums of its parameters and their adapters' deltas.

    The layer of each adapted parameter is a child under the parameter's name, so that the names of its tensors begin
    with that of the parameter. Outside of forward passes the module has its own parameters.

    Args:
        base_layer: The module.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    @property
    def layers(self) -> Iterator[tuple[str, ParameterLayer]]:
        """Name of each adapted parameter, and its layer."""
        for name, child in self._modules.items():
            if name != "base_layer":
                yield name, cast("ParameterLayer", child)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module returns with every active adapter's delta added to its parameter.

        Raises:
            RuntimeError: If ZeRO-3 has split the parameters or their adapters.
        """
        base = self.base_layer
        layers = [(name, layer) for name, layer in self.layers if layer.adds_delta()]
        if not layers:
            return base(*args, **kwargs)
        if is_split_by_zero(self):
            raise RuntimeError(
                "DeepSpeed's ZeRO-3 brings the parameters of modules that are called, and the adapters of "
                "`target_parameters` are in none of them: use ZeRO-2 or FSDP2, or leave `target_parameters` out"
            )

        def sums(prefix: str) -> dict[str, torch.Tensor]:
            return {f"{prefix}{name}": layer.adapted(getattr(base, name)) for name, layer in layers}

        def with_deltas(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(Calling(base, forward), sums("base."), args, kwargs)

        if not hasattr(base, "_hf_hook"):  # of accelerate, which brings the parameters of a call
            return torch.func.functional_call(base, sums(""), args, kwargs)
        with forward_replaced(base, with_deltas):
            return base(*args, **kwargs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the module itself, with the adapters merged into it if `merge` is true; PEFT calls it."""
        for _, layer in self.layers if merge else ():
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer
