"""GradDrop in a training run, for a GradDrop adapter or for any other parameters that train."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import (
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from torch import nn

from ..common.optimizer_watcher import OptimizerStep, forget, observers, watch
from .blocks import block_of, find_blocks, selected_blocks
from .config import GradDropConfig
from .layer import GradDropLayer
from .mask_sampler import MaskSampler
from .masked_steps import MaskedParameter, before_masked_step

_SAMPLE = 4096  # entries of a tensor that are compared with their earlier values


class GradDrop:
    """Announcer of epochs and steps to gradient masks, which also puts masks on models without a GradDrop adapter.

    A custom training loop needs two lines, the first before training and the second at the beginning of each epoch:

        graddrop = GradDrop(model, GradDropConfig.from_variant("GradDrop-Epoch", num_epochs=3))
        graddrop.set_epoch(epoch)

    Optimizer steps are counted automatically; `set_step` is for a run that is resumed.

    Args:
        model: A model with a GradDrop adapter, or any other model, such as one with a LoRA or SparseGrad adapter or
            one that is fine-tuned in full.
        config: None for the settings of the model's GradDrop adapter. Otherwise masks are put on every parameter that
            trains and is inside a transformer block or, with `target_modules`, inside one of these modules. GradDrop's
            layers are the model's blocks. Masked gradients are computed and then dropped; only a GradDrop adapter
            saves their computation.
        num_epochs: Number of epochs of the run; None for the configuration's.
        optimizer: Optimizer of the run. If given, a step by another optimizer is an error, because it is a sign that
            the run was interrupted.

    Masks that an earlier `GradDrop` has put on the same parameters are removed.

    Raises:
        ValueError: If there is nothing to mask, `config` is given for a model with a GradDrop adapter, or another
            `GradDrop` masks the same parameters for the same optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        config: GradDropConfig | None = None,
        num_epochs: int | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self._parameters: list[MaskedParameter] = []
        self._hooks: list[Any] = []
        self._adapter_layers = [layer for layer in model.modules() if isinstance(layer, GradDropLayer)]
        if config is None:
            self.samplers = self._adapter_samplers()
        else:
            self.samplers = [self._put_masks_on(model, config)]
        if num_epochs is not None:
            for sampler in self.samplers:
                sampler.set_num_epochs(num_epochs)
        _remove_masks_from({id(masked.parameter) for masked in self._parameters}, optimizer)
        if optimizer is not None:
            for sampler in self.samplers:
                sampler.bind(optimizer)
        self._before = [self._sample(masked.parameter) for masked in self._parameters]
        for masked in self._parameters:
            self._hooks.append(masked.parameter.register_hook(partial(self._masked_gradient, masked)))
        if self._parameters:
            watch(self)

    def set_epoch(self, epoch: int) -> None:
        """Announce an epoch, counted from 0.

        Raises:
            ValueError: If the number of epochs is needed but not known, or `epoch` is not below it.
        """
        for sampler in self.samplers:
            sampler.set_epoch(epoch)

    def set_step(self, step: int) -> None:
        """Announce an optimizer step, counted from 0; from now on every step has to be announced."""
        for sampler in self.samplers:
            sampler.set_step(step)

    def remove(self) -> None:
        """Remove the masks; a GradDrop adapter keeps its own masks but forgets everything that was announced."""
        for hook in self._hooks:
            hook.remove()
        for sampler in self.samplers:
            sampler.reset()
        self._hooks, self._parameters, self._before, self.samplers = [], [], [], []
        forget(self)

    def masked_parameters(self) -> list[MaskedParameter]:
        """Return the parameters that this object masks itself; the deltas of GradDrop adapters are not among them."""
        return self._parameters

    def before_step(self, step: OptimizerStep) -> Callable[[], None] | None:
        """Prepare the parameters that this object masks itself for a step of an optimizer that holds them."""
        return before_masked_step(self._parameters, step)

    def report(self) -> dict[str, float]:
        """Return the shares of entries that are dropped, train and have moved.

        Returns:
            `rate`: share that the schedule drops now. `active`: share of the masked entries that train in this step;
            for element-wise masks the expected share. `moved`: share of the entries whose value has changed. In a
            GradDrop adapter every entry is compared with 0, in other parameters a sample with its values from when
            this object was created.

        Raises:
            ValueError: If `remove` was called.
        """
        if not self.samplers:
            raise ValueError("there is nothing to report: `remove` was called")
        total = active = moved = 0.0
        for masked, now_moved in self._moved():
            count = masked.parameter.numel()
            total += count
            active += count * masked.sampler.mask(masked.name, masked.block).share
            moved += count * now_moved
        return {"rate": self.samplers[0].rate, "active": active / total, "moved": moved / total}

    def _adapter_samplers(self) -> list[MaskSampler]:
        samplers = {
            id(sampler): sampler
            for layer in self._adapter_layers
            for adapter_name, sampler in layer.graddrop_sampler.items()
            if adapter_name in layer.active_adapters
        }
        if not samplers:
            raise ValueError(
                "this model has no active GradDrop adapter: give a `GradDropConfig` to mask whatever else trains"
            )
        return list(samplers.values())

    def _put_masks_on(self, model: nn.Module, config: GradDropConfig) -> MaskSampler:
        if self._adapter_layers:
            raise ValueError(
                "this model has a GradDrop adapter with settings of its own: leave `config` out to use those"
            )
        blocks = [_plain(block) for block in find_blocks(model)]
        targets = _explicit_targets(model, blocks, config)
        chosen = {
            _plain(name): parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and _is_masked(_plain(name), targets)
        }
        if not chosen:
            raise ValueError(
                "GradDrop found nothing to mask: no parameter that trains is inside a transformer block, or inside "
                f"`target_modules={config.target_modules!r}`"
            )
        if empty := [name for name, parameter in chosen.items() if parameter.is_meta]:
            raise ValueError(
                f"GradDrop masks the parameters themselves, and {empty[0]!r} is on the meta device, so that loading "
                "replaces it: load the model before the masks are put on"
            )
        block_of_name = {name: block_of(name, blocks) or name.rpartition(".")[0] for name in chosen}
        sampler = MaskSampler(config, list(dict.fromkeys(block_of_name.values())))
        self._parameters = [
            MaskedParameter(parameter, sampler, name, block_of_name[name]) for name, parameter in chosen.items()
        ]
        return sampler

    def _masked_gradient(self, masked: MaskedParameter, gradient: torch.Tensor) -> torch.Tensor:
        masked.sampler.begin_backward()
        masked.sampler.check_steps_are_seen(masked.name, masked.parameter)
        own = gradient.clone(memory_format=torch.contiguous_format)
        return masked.sampler.mask_gradient_(own, masked.name, masked.block)

    def _moved(self) -> Iterator[tuple[MaskedParameter, float]]:
        for masked, before in zip(self._parameters, self._before, strict=True):
            now = self._sample(masked.parameter)
            yield masked, torch.count_nonzero(now != before.to(now.device)).item() / max(now.numel(), 1)
        for layer in self._adapter_layers:
            for masked in layer.masked_parameters():
                if any(masked.sampler is sampler for sampler in self.samplers):
                    yield masked, torch.count_nonzero(masked.parameter).item() / max(masked.parameter.numel(), 1)

    @staticmethod
    def _sample(parameter: torch.Tensor) -> torch.Tensor:
        flat = parameter.detach().flatten()
        return flat[:: max(-(-flat.numel() // _SAMPLE), 1)].clone()


def _remove_masks_from(parameters: set[int], optimizer: torch.optim.Optimizer | None) -> None:
    """Remove the masks that an earlier [`GradDrop`] has put on any of these parameters, as two masks would multiply.

    Args:
        parameters: `id` of each parameter.
        optimizer: Optimizer of the new run, or None.

    Raises:
        ValueError: If the earlier `GradDrop` serves the run of `optimizer`.
    """
    for owner in observers():
        if isinstance(owner, GradDrop) and any(id(each.parameter) in parameters for each in owner._parameters):
            if optimizer is not None and owner.samplers[0].is_bound_to(optimizer):
                raise ValueError("two `GradDropCallback`s mask the same parameters in one run: use one of them")
            owner.remove()


def _explicit_targets(model: nn.Module, blocks: list[str], config: GradDropConfig) -> PeftConfig:
    """Return a configuration whose `target_modules` are names, in place of None (the blocks) or `"all-linear"`."""
    if config.target_modules is None:
        return dataclasses.replace(config, target_modules=selected_blocks(blocks, config))
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return _maybe_include_all_linear_layers(dataclasses.replace(config), base)


def _plain(name: str) -> str:
    """Return a parameter's name without the prefixes of data parallelism and compilation."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _is_masked(name: str, config: PeftConfig) -> bool:
    """Return whether a parameter is inside a targeted module and not inside an excluded one."""
    parts = name.split(".")
    inside = [".".join(parts[:length]) for length in range(1, len(parts))]
    found = [check_target_module_exists(config, module) for module in inside]
    return any(found) and not any(isinstance(match, _ExcludedModule) for match in found)
