"""The base class of the tuners of both methods."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers, find_parameter_name_by_module
from peft.utils import NoMatchingPeftModuleError, _get_submodules
from torch import nn

from .adapted_parameters import AdaptedParameters
from .delta_layer import DeltaLayer
from .files.adapter_file import check_method
from .mixed_batches import mixed_batch
from .placement import check_model, check_targets
from .targeted_config import TargetedConfig
from .targets.modules import targeted_modules
from .targets.parameters import TargetedParameter, targeted_parameters
from .targets.unmatched_names import warn_of_unmatched, why_none_matches
from .targets.unusual_layers import check_layer
from .training.first_gradients import FirstGradients
from .weighted_merge import WeightedMerge, check_adapters, check_new_name, check_no_svd


class DeltaTuner(BaseTuner):
    """A tuner whose layers wrap modules of the base model, and give them back as they are when it is unloaded."""

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        super()._check_new_adapter_config(config)
        check_model(self.model)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = cast(TargetedConfig, self.peft_config[adapter_name])
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            raise NoMatchingPeftModuleError(f"{error} {why_none_matches(model, config)}".rstrip()) from None
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, DeltaLayer)}
        adapted = {name: layer for name, layer in layers.items() if layer.has_adapter(adapter_name)}
        if adapted and not config.inference_mode:
            first = next(iter(adapted.values()))
            first.first_gradients[adapter_name] = FirstGradients(config.title, adapter_name, adapted)

    def _targets(self, peft_config: PeftConfig, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """Return name and base layer of each module that is to have an adapter, before anything is changed.

        Raises:
            ValueError: If the weight of one lies where an adapter on it would be wrong.
            TypeError: If one computes something else than it seems to, or is never called.
        """
        _maybe_include_all_linear_layers(peft_config, model)  # PEFT calls it too, but only after `_prepare_model`
        targets = list(targeted_modules(model, peft_config, self._check_target_module_exists))
        for name, module in targets:
            check_layer(name, module, model)
        check_targets(targets, trains=not peft_config.inference_mode)
        if not peft_config.inference_mode:
            warn_of_unmatched(model, peft_config)
        return targets

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        """Return the base model, as PEFT does, and warn if the adapters have been unloaded from it already."""
        if not any(True for _ in _delta_layers(self.model)):
            warnings.warn(
                f"Nothing to {'merge' if merge else 'unload'}: the adapters have been unloaded already, and the model "
                "stays as it is.",
                stacklevel=3,
            )
        return super()._unload_and_optionally_merge(merge, *args, **kwargs)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Let a forward pass or `generate` with `adapter_names` mix adapters in a batch; PEFT calls it around both."""
        names = kwargs.get("adapter_names")
        with contextlib.nullcontext() if names is None else mixed_batch(self, names, kwargs.get("num_beams")):
            yield

    def _target_parameters(self, peft_config: Any, model: nn.Module) -> list[TargetedParameter]:
        """Return each parameter that is to have an adapter, before anything is changed.

        Raises:
            ValueError: If a name in `target_parameters` is that of no parameter, or an adapter on one would be wrong.
        """
        targets = targeted_parameters(model, peft_config, self._check_target_module_exists)
        check_targets([(target.name, target.module) for target in targets], trains=not peft_config.inference_mode)
        return targets

    def _inject_parameters(
        self, peft_config: PeftConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Add an adapter to each parameter, and return their names; PEFT's own nests a wrapper for each of them."""
        targets = targeted_parameters(model, peft_config, self._check_target_module_exists)
        for target in targets:
            parent, module, module_name = _get_submodules(model, target.module_name)
            existing = module._modules.get(target.parameter_name) if isinstance(module, AdaptedParameters) else None
            with init_empty_weights() if low_cpu_mem_usage else contextlib.nullcontext():
                self._create_and_replace(
                    peft_config,
                    adapter_name,
                    module if existing is None else existing,
                    module_name,
                    parent,
                    current_key=target.name,
                    parameter_name=target.parameter_name,
                )
        return [target.name for target in targets]

    def _add_modules_to_save_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        """Let the embedding and the layers tied to it train as one; PEFT calls it for `ensure_weight_tying`."""
        embedding = find_parameter_name_by_module(self.model, self.model.get_input_embeddings())  # pyright: ignore
        tied = [f".{name}" for name in (embedding, *tied_weight_keys)]
        others = [name for name in peft_config.modules_to_save if not any(each.endswith(f".{name}") for each in tied)]
        peft_config.modules_to_save, peft_config.modules_to_tie = [*others, embedding], set(tied_weight_keys)

    def _add_targets_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        """Raise a ValueError, as adapters on an embedding are not tied."""
        raise ValueError(
            "`ensure_weight_tying=True` ties what is trained in full, and `target_modules` names an embedding that is "
            f"tied to {', '.join(tied_weight_keys)}: name it in `modules_to_save`"
        )

    def _holder(self, parent: nn.Module, name: str, module: nn.Module) -> AdaptedParameters:
        """Return the module with adapted parameters that `parent` has in the place of `module`."""
        if not isinstance(module, AdaptedParameters):
            module, base = AdaptedParameters(module), module
            self._replace_module(parent, name, module, base)
        return module

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a layer in the place of the module that it wraps, or an unloaded module in the place of its wrapper.

        PEFT also moves a new layer to the device of the base weight, and assigns the wrapper's `weight` to an unloaded
        module. The layers move themselves, except to the meta device, where an adapter would lose its support. And an
        unloaded module has its weight; that of a wrapper of trained tokens is no parameter.
        """
        setattr(parent, child_name, new_module)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add an adapter that is a weighted merge of others, which does not become active.

        The arguments are LoRA's. A layer that only some of the adapters have is merged from those.

        Args:
            adapters: Names of the adapters.
            weights: Weight of each, positive or negative.
            adapter_name: Name of the new adapter.
            combination_type: `"linear"` and `"cat"` give Σ w ΔW, other than LoRA's `"linear"` exactly. The others, as
                in LoRA, but on the trained values in place of factors: `"magnitude_prune"` and `"dare_linear"` add
                what pruning leaves, `"ties"` and `"dare_ties"` elect a sign for each value first. All but `"cat"` need
                SparseGrad adapters with the same transition matrices.
            svd_rank: Not used: it is for LoRA's merges by SVD, like the three that follow.
            svd_clamp: Not used.
            svd_full_matrices: Not used.
            svd_driver: Not used.
            density: Share of each adapter's values that pruning keeps, in (0, 1]; only with a kind that prunes.
            majority_sign_method: `"total"` elects a sign by the sum of the values, `"frequency"` by their number.

        Raises:
            ValueError: If an argument cannot be used, or the adapters do not go together. Nothing is changed then.
        """
        check_new_name(self.peft_config, adapter_name)
        svd = {"svd_rank": svd_rank, "svd_clamp": svd_clamp, "svd_full_matrices": svd_full_matrices}
        check_no_svd(combination_type, **svd, svd_driver=svd_driver)
        merge = WeightedMerge(adapters, weights, combination_type, density, majority_sign_method)
        check_adapters(self.peft_config, adapters)
        config, fill = self._weighted_merge(merge)
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        fill(adapter_name)

    def _weighted_merge(self, merge: WeightedMerge) -> tuple[PeftConfig, Callable[[str], None]]:
        """Return the settings of the merge of some adapters, and what gives an adapter of that name its contents."""
        raise NotImplementedError

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return the tensors of a file under the names of the model's own.

        Raises:
            ValueError: If the adapter is merged, so that unmerging it would subtract what was not added, or the file
                is one of another method.
        """
        check_method(state_dict, cls.prefix, cast(TargetedConfig, config).title)
        if any(adapter_name in layer.merged_adapters for layer in _delta_layers(model)):
            raise ValueError(
                f"the adapter {adapter_name!r} is merged, and no other can be loaded in its place: call "
                "`model.unmerge_adapter()` first"
            )
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        """Return the tensors of a state dict that are the adapter's.

        Raises:
            ValueError: If the adapter has been unloaded, or PEFT does not find all of them.
        """
        if not any(layer.has_adapter(adapter_name) for layer in _delta_layers(model)):
            raise ValueError(
                f"the adapter {adapter_name!r} is on no layer of the model any more, and its file would be empty: "
                "after `merge_and_unload` or `unload`, save the model that they return"
            )
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        own = [name for name in state_dict if f".{cls.prefix}" in name and f".{adapter_name}." in name]
        lost = [name for name in own if name not in tensors]
        if lost:
            raise ValueError(
                f"PEFT would leave {lost[0]!r} and {len(lost) - 1} other tensors out of the file, because a wrapper "
                "inside the model, of FSDP1 or of activation checkpointing, has changed the names of its modules: use "
                "FSDP2 (`fsdp_version: 2`) and `model.gradient_checkpointing_enable()`"
            )
        return tensors


def _delta_layers(model: nn.Module) -> Iterator[DeltaLayer]:
    return (module for module in model.modules() if isinstance(module, DeltaLayer))
