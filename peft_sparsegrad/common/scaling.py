"""The factor of an adapter's delta, set at run time by LoRA's method names; as LoRA's, it is in no file."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


class ScaledPart:
    """The part of an adapter that is on one layer, and that holds its factor.

    Attributes:
        scale: The factor of the delta.
        merged_scale: The factor with which the delta was merged last.
    """

    scale: float = 1.0
    merged_scale: float = 1.0


class ScaledLayer(BaseTunerLayer):
    """A tuner layer whose adapters' deltas have a factor each, 1 at first.

    The gradient of an adapter's tensors has the same factor, as in LoRA.
    """

    merged_adapters: list[str]

    @property
    def scaling(self) -> Scaling:
        """The factor of each adapter on this layer by the adapter's name; an item can be set."""
        return Scaling(self)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the factor of an adapter, which may be on other layers only."""
        check_factor("scale", scale)
        if adapter in self.scaling:
            self.scaling[adapter] = scale

    def scale_layer(self, scale: float) -> None:
        """Multiply the factor of every active adapter."""
        factor = check_factor("scale", scale)
        self._update({name: self.scaling[name] * factor for name in self._active_here})

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the factor of every active adapter, or set it back to 1 if no `scale` is given."""
        if scale is None:
            self._update(dict.fromkeys(self._active_here, 1.0))
            return
        factor = check_factor("scale", scale)
        if factor == 0:
            raise ValueError("`scale` must not be 0 in `unscale_layer`, which divides by it: leave it out to reset")
        self._update({name: self.scaling[name] / factor for name in self._active_here})

    @property
    def _active_here(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.scaling]

    def _update(self, factors: dict[str, float]) -> None:
        for name, factor in factors.items():
            self.scaling.check(name, factor)
        for name, factor in factors.items():
            self.scaling[name] = factor


class Scaling(Mapping[str, float]):
    """The factors of a layer's adapters by name, a view. Setting one changes the layer, or is refused.

    Args:
        layer: The layer.
    """

    def __init__(self, layer: ScaledLayer) -> None:
        self._layer = layer

    @property
    def parts(self) -> Mapping[str, ScaledPart]:
        """What holds the factors, by the adapter's name."""
        return cast("Mapping[str, ScaledPart]", getattr(self._layer, self._layer.adapter_layer_names[0]))

    def __getitem__(self, adapter_name: str) -> float:
        return self.parts[adapter_name].scale

    def __setitem__(self, adapter_name: str, scale: float) -> None:
        self.check(adapter_name, scale)
        self.parts[adapter_name].scale = check_factor("scale", scale)

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def __repr__(self) -> str:
        return repr(dict(self))

    def check(self, adapter_name: str, scale: float) -> None:
        """Raise a ValueError if an adapter cannot have this factor, or a KeyError if there is no such adapter."""
        factor = check_factor("scale", scale)
        if factor != self[adapter_name] and adapter_name in self._layer.merged_adapters:
            raise ValueError(
                f"`scale` of {adapter_name!r} cannot become {factor!r} while the adapter is merged: call "
                "`model.unmerge_adapter()` first"
            )


def check_factor(name: str, factor: Any) -> float:
    """Return a factor, or raise a ValueError that calls it by `name` if it is no finite number.

    A tensor without dimensions is the number that it holds.
    """
    if isinstance(factor, torch.Tensor) and factor.ndim == 0 and not factor.is_meta:
        factor = factor.item()
    if not isinstance(factor, Real) or isinstance(factor, bool) or not math.isfinite(factor):
        raise ValueError(f"`{name}` must be a finite number, not {factor!r}")
    return float(factor)


@contextlib.contextmanager
def scales_of(parts: Mapping[ScaledPart, float]) -> Iterator[None]:
    """Let the parts of adapters have these factors inside the block, merged or not."""
    before = {part: part.scale for part in parts}
    try:
        for part, scale in parts.items():
            part.scale = scale
        yield
    finally:
        for part, scale in before.items():
            part.scale = scale


@contextlib.contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiply the factor of every SparseGrad and GradDrop adapter inside the block.

    PEFT's function of this name, in `peft.helpers`, does so for LoRA and refuses a model without LoRA layers. With a
    multiplier between 0 and 1, the outputs are those of weights between the base model's and the trained ones
    (WiSE-FT, arXiv 2109.01903).

    Args:
        model: A model with adapters that are not merged.
        multiplier: Any finite number.

    Raises:
        ValueError: If the multiplier is not finite, an adapter is merged, or the model has none of ours.

    Example:

        >>> with peft_sparsegrad.rescale_adapter_scale(model, 0.5):
        ...     outputs = model(**inputs)
    """
    factor = check_factor("multiplier", multiplier)
    layers = [module for module in model.modules() if isinstance(module, ScaledLayer)]
    if not layers:
        raise ValueError("the model has no SparseGrad or GradDrop adapter: for LoRA use `peft.helpers`")
    scaled: dict[ScaledPart, float] = {}
    for layer in layers:
        for name, part in layer.scaling.parts.items():
            layer.scaling.check(name, part.scale * factor)
            scaled[part] = part.scale * factor
    with scales_of(scaled):
        yield
