"""Masks on the gradients of parameters that are no GradDrop deltas: LoRA matrices, SparseGrad values, weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
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

from ..common.training.optimizer_watcher import OptimizerStep, forget, watch
from ..common.training.pieces import is_dtensor, refuse_views
from .blocks import block_of, find_blocks, selected_blocks
from .config import GradDropConfig
from .mask_sampler import MaskSampler
from .masked_steps import MaskedParameter, before_masked_step


@dataclasses.dataclass(frozen=True)
class Place:
    """A parameter's place in the model, which FSDP2 fills with another tensor in each forward pass.

    Attributes:
        module: Module that has the parameter.
        attribute: Name of the parameter in the module.
        reader: The module, or the nearest around it that has a forward pass.
        name: Name of the parameter in the model, on which its mask depends.
        block: Name of its transformer block.
    """

    module: nn.Module
    attribute: str
    reader: nn.Module
    name: str
    block: str

    @property
    def tensor(self) -> nn.Parameter:
        """The tensor that is in the place now."""
        return getattr(self.module, self.attribute)


class ParameterMasks:
    """Masks on the parameters of modules that know nothing of them.

    A mask is put on the tensor that a forward pass reads, so that it holds wherever that came from. The model keeps
    its masks alive.

    Args:
        sampler: Sampler of the masks.
        places: Places of the parameters.
    """

    def __init__(self, sampler: MaskSampler, places: list[Place]) -> None:
        self.sampler, self.places = sampler, places
        self._masked: dict[str, torch.Tensor] = {}  # by name
        self._first: dict[str, torch.Tensor] = {}  # those of the start
        self._handles: list[Any] = []
        self._readers: dict[nn.Module, list[Place]] = {}
        for place in places:
            self._readers.setdefault(place.reader, []).append(place)

    def start(self) -> None:
        """Put the masks on, and hold entries in every optimizer's steps from now on."""
        for reader in self._readers:
            self._handles.append(reader.register_forward_pre_hook(_BeforeForward(self)))
            self._handles.append(reader.register_load_state_dict_post_hook(_AfterLoading(self.sampler)))
            self.put_on(reader)
        self._first = dict(self._masked)
        watch(self)

    def before_step(self, step: OptimizerStep) -> Callable[[], None] | None:
        """Prepare the parameters for a step of an optimizer that holds them."""
        return before_masked_step(self.masked_parameters(), step)

    def put_on(self, reader: nn.Module) -> None:
        """Put masks on the tensors that the forward pass of `reader` is about to read, unless they have them."""
        for place in self._readers.get(reader, ()):
            tensor = place.tensor
            if self._masked.get(place.name) is not tensor and not is_dtensor(tensor):
                refuse_views(tensor, "mask their gradients", "train without GradDrop")
                self._masked[place.name] = tensor
                self._handles.append(tensor.register_hook(partial(self._mask, place)))

    def masked_parameters(self) -> list[MaskedParameter]:
        """Return the parameters with everything that their masks depend on.

        Raises:
            RuntimeError: If a parameter has been sharded, and no forward pass has read it through its module since.
        """
        parameters = [MaskedParameter(each.tensor, self.sampler, each.name, each.block) for each in self.places]
        for parameter, _, name, _ in parameters:
            is_read = self._masked.get(name) is not self._first.get(name)
            if is_dtensor(parameter) and parameter.grad is not None and not is_read:
                raise RuntimeError(
                    f"GradDrop cannot mask the gradient of {name!r}, which is sharded and which no module's forward "
                    "pass has read: name other modules in `target_modules`"
                )
        return parameters

    def _mask(self, place: Place, gradient: torch.Tensor) -> torch.Tensor:
        self.sampler.progress.begin_backward()
        self.sampler.progress.check_steps_are_seen(place.name, place.tensor)
        own = gradient.clone(memory_format=torch.contiguous_format)
        return self.sampler.mask_gradient_(own, place.name, place.block)

    def remove(self) -> None:
        """Take the masks off, and forget everything that was announced."""
        for handle in self._handles:
            handle.remove()
        forget(self)
        self.sampler.reset()
        self._handles, self.places, self._readers, self._masked, self._first = [], [], {}, {}, {}


class _BeforeForward:
    """A hook that puts masks on before a forward pass, and that does nothing in a copy of the model."""

    def __init__(self, masks: ParameterMasks | None = None) -> None:
        self._masks = masks

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self._masks is not None and not torch.compiler.is_compiling():
            self._masks.put_on(module)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class _AfterLoading:
    """A hook that tells a sampler of loaded parameters, and that does nothing in a copy of the model."""

    def __init__(self, sampler: MaskSampler | None = None) -> None:
        self._sampler = sampler

    def __call__(self, module: nn.Module, incompatible_keys: Any) -> None:
        if self._sampler is not None:
            self._sampler.progress.values_replaced()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def masks_for(model: nn.Module, config: GradDropConfig) -> ParameterMasks:
    """Return masks for every parameter that trains and is inside of a transformer block or of a target.

    Args:
        model: The model, or a wrapper around it.
        config: The GradDrop settings, whose `target_modules` may be None for all blocks.

    Raises:
        ValueError: If there is nothing to mask, or a parameter is on the meta device.
    """
    blocks = [plain_name(block) for block in find_blocks(model)]
    targets = _explicit_targets(model, blocks, config)
    places = [
        place
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and _is_masked(plain_name(name), targets)
        for place in [_place(model, name, blocks)]
    ]
    if not places:
        raise ValueError(
            "GradDrop found nothing to mask: no parameter that trains is inside a transformer block, or inside "
            f"`target_modules={config.target_modules!r}`"
        )
    if empty := [place.name for place in places if place.tensor.is_meta]:
        raise ValueError(
            f"GradDrop masks the parameters themselves, and {empty[0]!r} is on the meta device, so that loading "
            "replaces it: load the model before the masks are put on"
        )
    return ParameterMasks(MaskSampler(config, list(dict.fromkeys(place.block for place in places))), places)


def _place(model: nn.Module, path: str, blocks: list[str]) -> Place:
    owner, _, attribute = path.rpartition(".")
    parts, name = owner.split("."), plain_name(path)
    around = [model.get_submodule(".".join(parts[:length])) for length in range(len(parts), 0, -1)]
    readers = [module for module in around if type(module).forward is not nn.Module.forward]
    block = block_of(name, blocks) or name.rpartition(".")[0]
    return Place(around[0], attribute, readers[0] if readers else model, name, block)


def _explicit_targets(model: nn.Module, blocks: list[str], config: GradDropConfig) -> PeftConfig:
    """Return a configuration whose `target_modules` are names, in place of None (the blocks) or `"all-linear"`."""
    if config.target_modules is None:
        return dataclasses.replace(config, target_modules=selected_blocks(blocks, config))
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return _maybe_include_all_linear_layers(dataclasses.replace(config), base)


def plain_name(name: str) -> str:
    """Return a parameter's name without the prefixes of data parallelism and compilation."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _is_masked(name: str, config: PeftConfig) -> bool:
    """Return whether a parameter is inside a targeted module and not inside an excluded one."""
    parts = name.split(".")
    inside = [".".join(parts[:length]) for length in range(1, len(parts))]
    found = [check_target_module_exists(config, module) for module in inside]
    return any(found) and not any(isinstance(match, _ExcludedModule) for match in found)
