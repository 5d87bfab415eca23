"""The base class of the tuners of both methods."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn


class DeltaTuner(BaseTuner):
    """A tuner whose layers wrap modules of the base model, and give them back as they are when it is unloaded."""

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a module in the place of another; one that is unloaded from its wrapper already holds its own weight.

        PEFT would assign it the wrapper's `weight`, which for trained tokens is no parameter and for a head of several
        layers is not there.
        """
        if isinstance(new_module, BaseTunerLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            setattr(parent, child_name, new_module)
