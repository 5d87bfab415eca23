"""Weighted merges of SparseGrad adapters: cores in one basis, on the union of their supports."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ..common.targets.modules import exact_targets
from ..common.weighted_merge import WeightedMerge
from ..functional import num_trained_values
from .adapter import LayerAdapter
from .basis import Basis
from .config import SparseGradConfig
from .joined_basis import JoinedBasis, join, same
from .layer import layer_adapters
from .plan import plan_weight
from .settled import check_settled


class Part(NamedTuple):
    """What an adapter of a merge has on one layer; the weight is that of the merge times the layer's scale."""

    name: str
    weight: float
    adapter: LayerAdapter


class MergedLayer(NamedTuple):
    """Contents of a merge on one layer.

    Attributes:
        weight_shape: (out, in).
        basis: Its basis, the same object for layers that share one.
        values: Shape (k,), in the adapters' dtype, at least float32.
        indices: Sorted flat positions of the values in the core, int64 (k,).
    """

    weight_shape: tuple[int, int]
    basis: JoinedBasis
    values: torch.Tensor
    indices: torch.Tensor

    @property
    def ranks(self) -> tuple[int | None, int | None]:
        """Columns (r_out, r_in) of V and U; None for a side in the weight's own basis."""
        V, U = (None if side is None else side.shape[-1] for side in (self.basis.V, self.basis.U))
        return V, U


@torch.no_grad()
def merge_adapters(
    model: nn.Module, configs: Mapping[str, Any], merge: WeightedMerge
) -> tuple[SparseGradConfig, dict[str, MergedLayer]]:
    """Return settings and contents, by layer, of a weighted merge.

    Raises:
        ValueError: If an adapter is in its warm-up, or their bases do not go together.
    """
    kinds = {name: configs[name].basis for name in merge.adapters}
    if len(set(kinds.values())) > 1 and "identity" in kinds.values():
        raise ValueError(
            f"`adapters` with basis='identity' and others have no basis in common that is smaller than the weight, "
            f"here {kinds}: add them to the weights with `merge_adapter`"
        )
    layers = _merged_layers(_parts(model, merge), merge)
    basis = kinds[merge.adapters[0]] if len(set(kinds.values())) == 1 else "svd"
    config = _config(configs[merge.adapters[0]], model, layers, basis)
    if not _groups_share_bases(config, layers):
        config = replace(config, basis="svd")  # each layer has a basis of its own
    return config, layers


@torch.no_grad()
def fill_adapter(model: nn.Module, layers: Mapping[str, MergedLayer], adapter_name: str) -> None:
    """Give an adapter without contents those of a merge."""
    for adapter in layer_adapters(model, adapter_name):
        merged = layers[adapter.plan.name]
        adapter.basis.fill(merged.basis.U, merged.basis.V)
        adapter.place(merged.indices)
        adapter.values.data = merged.values.to(adapter.values.device)
        adapter.settle()


def _parts(model: nn.Module, merge: WeightedMerge) -> dict[str, list[Part]]:
    """Return the parts of each layer that one of the adapters is on."""
    parts: dict[str, list[Part]] = {}
    for name, weight in zip(merge.adapters, merge.weights, strict=True):
        adapters = layer_adapters(model, name)
        check_settled(adapters, name)
        for adapter in adapters:
            parts.setdefault(adapter.plan.name, []).append(Part(name, weight * adapter.scale, adapter))
    return parts


def _merged_layers(parts: Mapping[str, Sequence[Part]], merge: WeightedMerge) -> dict[str, MergedLayer]:
    known: dict[str, list[Basis]] = {}  # by role, the bases that differ
    joined: dict[tuple[int, ...], JoinedBasis] = {}
    layers = {}
    for layer, on_layer in parts.items():
        bases = [_first_equal(part.adapter, known) for part in on_layer]
        different = {id(basis): basis for basis in bases}
        key = tuple(different)
        if key not in joined:
            joined[key] = join(list(different.values()))
        _check_basis(layer, on_layer, joined[key], merge)
        cores = [
            joined[key].core(key.index(id(basis)), _core(part, merge))
            for basis, part in zip(bases, on_layer, strict=True)
        ]
        layers[layer] = _merged_layer(on_layer, joined[key], cores, merge)
    return layers


def _first_equal(adapter: LayerAdapter, known: dict[str, list[Basis]]) -> Basis:
    """Return the first basis of the layer's role that is equal to its own."""
    bases = known.setdefault(adapter.plan.role, [])
    for basis in bases:
        if same(basis, adapter.basis):
            return basis
    bases.append(adapter.basis)
    return adapter.basis


def _check_basis(layer: str, parts: Sequence[Part], basis: JoinedBasis, merge: WeightedMerge) -> None:
    names = " and ".join(dict.fromkeys(repr(part.name) for part in parts))
    if not basis.keeps_entries and merge.combination_type != "cat":
        raise ValueError(
            f"`combination_type={merge.combination_type!r}` merges cores entry by entry, and {names} have different "
            f"transition matrices at {layer!r}: use combination_type='cat', which is exact, or train them with one "
            "`transition_matrices` file"
        )
    if not basis.is_shared and basis.U is None and basis.V is None:
        raise ValueError(
            f"`adapters`: {names} have transition matrices on opposite sides at {layer!r}, and no basis in common "
            "that is smaller than the weight: add them to the weights with `merge_adapter`"
        )


def _core(part: Part, merge: WeightedMerge) -> torch.Tensor:
    """Return the pruned core (r_out, r_in), float64."""
    values = merge.pruned(part.adapter.values.detach().double())
    return part.adapter.core._replace(values=values).matrix(torch.float64)


def _merged_layer(
    parts: Sequence[Part], basis: JoinedBasis, cores: Sequence[torch.Tensor], merge: WeightedMerge
) -> MergedLayer:
    plan, dtype = parts[0].adapter.plan, parts[0].adapter.values.dtype
    support = torch.stack([core != 0 for core in cores]).any(0).flatten()
    for part in parts:
        if basis.is_shared and part.adapter.indices is not None:
            support[part.adapter.indices] = True  # those of zeros too: they train on
    _add_missing(support, plan.weight_shape)
    indices = support.nonzero().flatten()
    values = merge.merged(cores, [part.weight for part in parts]).flatten()[indices]
    return MergedLayer(plan.weight_shape, basis, values.to(torch.promote_types(dtype, torch.float32)), indices)


def _add_missing(support: torch.Tensor, weight_shape: tuple[int, int]) -> None:
    """Add entries, whose values are zero, to a support that is smaller than any that a density can ask for."""
    out_features, in_features = weight_shape
    k = int(support.sum())
    missing = num_trained_values(out_features, in_features, k / (out_features * in_features)) - k
    support[(~support).nonzero().flatten()[:missing]] = True


def _config(
    first: SparseGradConfig, model: nn.Module, layers: Mapping[str, MergedLayer], basis: Any
) -> SparseGradConfig:
    """Return the first adapter's settings, with the modules, ranks and numbers of values of the merge."""
    patterns = {f"^{re.escape(name)}": layer for name, layer in layers.items()}
    targets: Any = exact_targets(model, list(layers))
    return replace(
        first,
        target_modules=targets,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        basis=basis,
        support="static",
        warmup_steps=0,
        transition_matrices=None,
        init_weights=True,
        num_values=None,
        density_pattern={p: len(layer.indices) / _size(layer.weight_shape) for p, layer in patterns.items()},
        rank="auto",
        rank_pattern={} if basis == "identity" else {p: layer.ranks for p, layer in patterns.items()},
    )


def _size(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]


def _groups_share_bases(config: SparseGradConfig, layers: Mapping[str, MergedLayer]) -> bool:
    """Return whether all layers that the settings put in one group have the same basis."""
    shared: dict[Any, JoinedBasis] = {}
    keys: Iterator[tuple[Any, JoinedBasis]] = (
        (plan_weight(config, name, layer.weight_shape).group_key, layer.basis) for name, layer in layers.items()
    )
    return all(shared.setdefault(key, basis) is basis for key, basis in keys)
