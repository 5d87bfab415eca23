"""The base class of the tuners of both methods."""

from __future__ import annotations

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers
from torch import nn

from .placement import check_model, check_targets
from .targeting import targeted_modules


class DeltaTuner(BaseTuner):
    """A tuner whose layers wrap modules of the base model, and give them back as they are when it is unloaded."""

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        super()._check_new_adapter_config(config)
        check_model(self.model)

    def _targets(self, peft_config: PeftConfig, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """Return name and base layer of each module that is to have an adapter, before anything is changed.

        Raises:
            ValueError: If the weight of one lies where an adapter on it would be wrong.
        """
        _maybe_include_all_linear_layers(peft_config, model)  # PEFT calls it too, but only after `_prepare_model`
        targets = list(targeted_modules(model, peft_config, self._check_target_module_exists))
        check_targets(targets, trains=not peft_config.inference_mode)
        return targets

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a layer in the place of the module that it wraps, or an unloaded module in the place of its wrapper.

        PEFT also moves a new layer to the device of the base weight, and assigns the wrapper's `weight` to an unloaded
        module. The layers move themselves, except to the meta device, where an adapter would lose its support. And an
        unloaded module has its weight; that of a wrapper of trained tokens is no parameter.
        """
        setattr(parent, child_name, new_module)
