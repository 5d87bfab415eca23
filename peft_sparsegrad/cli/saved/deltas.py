"""What saved adapters add to the weights, module by module, from the files alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from ...functional import unpack_support
from ..errors import InputError
from .adapter import SavedAdapter, grouped_by_module
from .sparsegrad import saved_layers

WITH_DELTAS = ("SPARSEGRAD", "GRADDROP", "LORA")


@dataclass(frozen=True)
class WeightLayout:
    """How the base model stores a weight.

    Attributes:
        shape: (out, in).
        transposed: Whether it is stored as (in, out), as transformers' Conv1D does.
    """

    shape: tuple[int, int]
    transposed: bool = False


@dataclass(frozen=True)
class FlatDelta:
    """A GradDrop delta: entries of a tensor in its own layout.

    Attributes:
        positions: Flat positions of the values, int64 (k,), or None for all of them.
        values: Float32, (k,).
        shape: Shape of the tensor, or None where only entries are stored.
    """

    positions: torch.Tensor | None
    values: torch.Tensor
    shape: tuple[int, ...] | None

    @property
    def changed(self) -> torch.Tensor:
        """Sorted flat positions of the entries that are not zero."""
        nonzero = self.values.nonzero().flatten()
        return nonzero if self.positions is None else self.positions[nonzero]


def graddrop_deltas(adapter: SavedAdapter) -> dict[str, dict[str, str]]:
    """Names of the tensors of a GradDrop adapter: parameter such as `layers.0.up_proj.weight` to its parts.

    Returns:
        Of each parameter `delta` and, where only some entries are stored, `support`.
    """
    found: dict[str, dict[str, str]] = {}
    for module, parts in grouped_by_module(list(adapter.tensors), "graddrop_").items():
        for part, name in parts.items():
            kind = part.removesuffix("_support")
            found.setdefault(f"{module}.{kind}", {})["support" if part != kind else "delta"] = name
    damaged = [parameter for parameter, parts in found.items() if "delta" not in parts]
    if damaged or not found:
        what = f"the delta of {damaged[0]!r} is missing" if damaged else "it holds no tensor of GradDrop"
        raise InputError(f"{adapter.weights_path} is damaged: {what}")
    return found


def read_flat_delta(adapter: SavedAdapter, parts: Mapping[str, str]) -> FlatDelta:
    """Read one delta of a GradDrop adapter."""
    stored = adapter.tensor(parts["delta"]).float()
    if "support" not in parts:
        return FlatDelta(None, stored.flatten(), tuple(stored.shape))
    packed = adapter.tensor(parts["support"])
    entries = 8 * packed.numel() if packed.dtype is torch.uint8 else 1 << 31  # the bits past the last are zero
    try:
        return FlatDelta(unpack_support(packed, entries, stored.numel()), stored, None)
    except ValueError as error:
        raise InputError(f"{adapter.weights_path} is damaged at {parts['support']!r}: {error}") from error


def delta_shapes(adapter: SavedAdapter) -> dict[str, tuple[int, int] | None]:
    """(out, in) of every weight with a delta; None where the files do not tell it.

    Raises:
        InputError: If the method has no delta that can be read, or the file is damaged.
    """
    if adapter.method == "SPARSEGRAD":
        return {layer.module: layer.weight_shape for layer in saved_layers(adapter)}
    if adapter.method == "GRADDROP":
        return {name.removesuffix(".weight"): None for name in graddrop_deltas(adapter) if name.endswith(".weight")}
    if adapter.method == "LORA":
        return {
            module: (adapter.tensors[parts["B.weight"]].shape[0], adapter.tensors[parts["A.weight"]].shape[1])
            for module, parts in _lora_modules(adapter).items()
        }
    raise InputError(f"the weights of a {adapter.method} adapter cannot be read; {', '.join(WITH_DELTAS)} can")


class DenseDeltas:
    """ΔW (out, in) in float32 of the modules of an adapter, one at a time."""

    def __init__(self, adapter: SavedAdapter) -> None:
        self.adapter = adapter
        if adapter.method == "SPARSEGRAD":
            self._layers = {layer.module: layer for layer in saved_layers(adapter)}
        elif adapter.method == "GRADDROP":
            self._parameters = graddrop_deltas(adapter)
        else:
            self._config = _lora_config(adapter)
            self._factors = _lora_modules(adapter)

    def __call__(self, module: str, layout: WeightLayout) -> torch.Tensor:
        """ΔW of a module whose weight is stored like that.

        Raises:
            InputError: If the delta belongs to a weight of another shape.
        """
        if self.adapter.method == "SPARSEGRAD":
            return self._layers[module].delta(layout.shape)
        if self.adapter.method == "GRADDROP":
            return self._spread(module, layout)
        parts = self._factors[module]
        b, a = (self.adapter.tensor(parts[f"{factor}.weight"]).float() for factor in "BA")
        return b @ a * _lora_scale(self._config, module, a.shape[0])

    def _spread(self, module: str, layout: WeightLayout) -> torch.Tensor:
        delta = read_flat_delta(self.adapter, self._parameters[f"{module}.weight"])
        stored = layout.shape[::-1] if layout.transposed else layout.shape
        positions = torch.arange(len(delta.values)) if delta.positions is None else delta.positions
        entries = stored[0] * stored[1]
        if delta.shape not in (None, stored) or (len(positions) and int(positions[-1]) >= entries):
            raise InputError(f"{self.adapter.folder}: the delta of {module!r} is not of a weight of shape {stored}")
        dense = torch.zeros(entries).index_copy(0, positions, delta.values).view(stored)
        return dense.T if layout.transposed else dense


def _lora_config(adapter: SavedAdapter) -> LoraConfig:
    try:
        config = LoraConfig.from_pretrained(str(adapter.folder))
    except (TypeError, ValueError) as error:
        raise InputError(f"the settings in {adapter.folder} cannot be used: {error}") from error
    assert isinstance(config, LoraConfig)
    return config


def _lora_scale(config: LoraConfig, module: str, rank: int) -> float:
    alpha = (config.alpha_pattern or {}).get(
        get_pattern_key(list(config.alpha_pattern or {}), module), config.lora_alpha
    )
    return alpha / rank**0.5 if config.use_rslora else alpha / rank


def _lora_modules(adapter: SavedAdapter) -> dict[str, dict[str, str]]:
    modules = grouped_by_module(list(adapter.tensors), "lora_")
    for module, parts in modules.items():
        if parts.keys() != {"A.weight", "B.weight"} or any(len(adapter.tensors[n].shape) != 2 for n in parts.values()):
            raise InputError(
                f"{adapter.folder}: {module!r} has the tensors {', '.join(f'lora_{part}' for part in parts)}; only "
                "plain LoRA of linear layers can be read, lora_A and lora_B"
            )
    if not modules:
        raise InputError(f"{adapter.weights_path} holds no tensor of LoRA")
    return modules
