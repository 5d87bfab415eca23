"""The base class of the tuners of both methods."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTuner
from torch import nn


class DeltaTuner(BaseTuner):
    """A tuner whose layers wrap modules of the base model, and give them back as they are when it is unloaded."""

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a layer in the place of the module that it wraps, or an unloaded module in the place of its wrapper.

        PEFT also moves a new layer to the device of the base weight, and assigns the wrapper's `weight` to an unloaded
        module. The layers move themselves, except to the meta device, where an adapter would lose its support. And an
        unloaded module has its weight; that of a wrapper of trained tokens is no parameter.
        """
        setattr(parent, child_name, new_module)
