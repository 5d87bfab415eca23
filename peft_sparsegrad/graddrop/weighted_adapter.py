"""Weighted merges of GradDrop adapters, whose deltas are all in the weights' own coordinates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..common.targets.modules import exact_targets
from ..common.weighted_merge import WeightedMerge
from .config import GradDropConfig
from .layer import GradDropLayer

_KINDS = ("weight", "bias")


@torch.no_grad()
def merge_adapters(
    model: nn.Module, configs: Mapping[str, Any], merge: WeightedMerge
) -> tuple[GradDropConfig, dict[str, torch.Tensor]]:
    """Return settings and deltas of a weighted merge; the names of deltas end in `.weight` or `.bias`.

    The settings are the first adapter's, with the modules of all. Nothing is left out of its file.
    """
    deltas, names = {}, []
    for layer in _layers(model):
        having = [name for name in merge.adapters if layer.has_adapter(name)]
        names += [layer.graddrop_name] if having else []
        for kind in _KINDS:
            if having and layer.deltas(having[0]).of(kind) is not None:
                deltas[f"{layer.graddrop_name}.{kind}"] = _merged(layer, kind, merge)
    first = configs[merge.adapters[0]]
    targets: Any = exact_targets(model, names)
    config = replace(
        first,
        target_modules=targets,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        save_density=None,
        init_weights=True,
    )
    return config, deltas


def fill_adapter(model: nn.Module, deltas: Mapping[str, torch.Tensor], adapter_name: str) -> None:
    """Give an adapter without contents the deltas of a merge."""
    for layer in _layers(model):
        for kind in _KINDS if layer.has_adapter(adapter_name) else ():
            parameter = layer.deltas(adapter_name).of(kind)
            if parameter is not None:
                parameter.data = deltas[f"{layer.graddrop_name}.{kind}"]


def _merged(layer: GradDropLayer, kind: str, merge: WeightedMerge) -> torch.Tensor:
    parts, weights = [], []
    for name, weight in zip(merge.adapters, merge.weights, strict=True):
        delta = layer.deltas(name).of(kind) if layer.has_adapter(name) else None
        if delta is not None:
            delta = delta.detach()
            parts.append(merge.pruned(delta.to(torch.promote_types(delta.dtype, torch.float32))))
            weights.append(weight * layer.deltas(name).scale)
    return merge.merged(parts, weights)


def _layers(model: nn.Module) -> Iterator[GradDropLayer]:
    return (module for module in model.modules() if isinstance(module, GradDropLayer))
