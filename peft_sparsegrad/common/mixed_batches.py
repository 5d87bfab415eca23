"""Batches whose rows are for different adapters: `model(..., adapter_names=[...])`, as with LoRA.

The model's own forward pass knows nothing of the names. Hooks hand them to the adapted layers for one call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

BASE = "__base__"  # PEFT's name for a row without an adapter

# Parts of the names of modules whose input may by chance be as long as the batch, but is ordered in another way.
_WITHOUT_ROWS = ("experts", "relative_attention_bias")


class MixedBatchLayer(BaseTunerLayer):
    """A tuner layer that can take rows for different adapters in one batch.

    Attributes:
        has_rows: False if the layer is not called with the rows of the batch.
    """

    has_rows: ClassVar[bool] = True

    base_layer: nn.Module
    quantization_backend: Any

    def has_adapter(self, adapter_name: str) -> bool:
        """Return whether the adapter is on this layer."""
        raise NotImplementedError

    def rows_of(
        self, adapter_name: str, rows: torch.Tensor, result: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Return the output of one adapter for some rows of a batch, shape (rows, ...).

        Args:
            adapter_name: Name of the adapter.
            rows: Positions of the rows, int64 (rows,).
            result: Output of the base layer, shape (batch, ...).
            x: Input of the layer, shape (batch, ...).
            args: What else the layer is called with.
            kwargs: What else it is called with by name.
        """
        raise NotImplementedError

    def mixed_forward(self, x: torch.Tensor, *args: Any, adapter_names: Sequence[str], **kwargs: Any) -> torch.Tensor:
        """Return the output for x (batch, ...), each row with the adapter that is named for it."""
        if len(x) != len(adapter_names):
            raise ValueError(
                f"`adapter_names` has {len(adapter_names)} names for {len(x)} rows: give one name for each row, the "
                "number of beams to `generate` as `num_beams`, and in place of `num_return_sequences` each row with "
                "its name as often"
            )
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for name in dict.fromkeys(adapter_names):
            if self.has_adapter(name):
                rows = torch.tensor([row for row, each in enumerate(adapter_names) if each == name], device=x.device)
                result[rows] = self.rows_of(name, rows, result, x, *args, **kwargs).to(result.dtype)
        return result


@contextlib.contextmanager
def mixed_batch(tuner: nn.Module, adapter_names: Sequence[str], num_beams: Any = None) -> Iterator[None]:
    """Let the layers of a tuner compute each row of a batch with the adapter named for it, inside the block.

    Args:
        tuner: The tuner, whose `model` is the base model.
        adapter_names: One name for each row, `"__base__"` for none.
        num_beams: Number of beams for which `generate` repeats each row, all but those of an encoder.

    Raises:
        ValueError: If the names are no list of this model's adapters, or the model cannot mix them as it is.
    """
    modules: dict[str, Any] = {
        name: module
        for name, module in tuner.named_modules()
        if isinstance(module, (MixedBatchLayer, AuxiliaryTrainingWrapper))
    }
    _check_names(modules, adapter_names)
    _check_model(tuner, modules, {name for name in adapter_names if name != BASE})
    beams = num_beams if isinstance(num_beams, int) else 1
    repeated = [name for name in adapter_names for _ in range(beams)]
    encoder = _encoder_modules(tuner.model)  # pyright: ignore[reportArgumentType]
    handles = [
        module.register_forward_pre_hook(
            partial(_with_names, names=adapter_names if module in encoder else repeated), with_kwargs=True
        )
        for module in modules.values()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _with_names(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}


def _check_names(modules: dict[str, nn.Module], adapter_names: Sequence[str]) -> None:
    if not isinstance(adapter_names, (list, tuple)):
        raise ValueError(f"`adapter_names` must be a list with one name for each row, not {adapter_names!r}")
    layers = [module for module in modules.values() if isinstance(module, MixedBatchLayer)]
    known = sorted({name for layer in layers for name in layer._all_available_adapter_names()})
    unknown = [name for name in adapter_names if name != BASE and name not in known]
    if unknown:
        raise ValueError(
            f"`adapter_names` has {unknown[0]!r}, which is no adapter of this model: it has {', '.join(known)}, and "
            f"{BASE} stands for none"
        )


def _check_model(tuner: nn.Module, modules: dict[str, nn.Module], named: set[str]) -> None:
    """Raise a ValueError if the model is in a state, or has a layer, in which rows would get a wrong adapter."""
    if tuner.training:
        raise ValueError("`adapter_names` cannot be used in training mode: call `model.eval()` first")
    for name, module in modules.items():
        if isinstance(module, AuxiliaryTrainingWrapper):
            _check_wrapper(name, module, named)
            continue
        assert isinstance(module, MixedBatchLayer)
        if module.merged:
            raise ValueError(
                "`adapter_names` cannot be used while adapters are merged: call `model.unmerge_adapter()` first"
            )
        has_rows = module.has_rows and not any(part in _WITHOUT_ROWS for part in name.split("."))
        if not has_rows and any(map(module.has_adapter, named)):
            raise ValueError(
                f"`adapter_names` cannot be used with an adapter on {name!r}, whose input does not have the rows of "
                "the batch: run each adapter's rows by themselves after `model.set_adapter`"
            )


def _check_wrapper(name: str, wrapper: AuxiliaryTrainingWrapper, named: set[str]) -> None:
    """Raise a ValueError if PEFT's wrapper of a trained module would take the original one for a row, or fail."""
    own = named & wrapper._adapters
    takes_original = any(active not in wrapper._adapters for active in wrapper.active_adapters)
    if own if takes_original else named - own:
        raise ValueError(
            f"`adapter_names` cannot mix adapters of which only some train {name!r}, and one that does must be "
            "active: run each adapter's rows by themselves after `model.set_adapter`"
        )


def _encoder_modules(model: nn.Module) -> set[nn.Module]:
    """Return the modules of the encoder of a model that has a decoder beside it, or none."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return set()
    return set(model.get_encoder().modules())  # pyright: ignore
