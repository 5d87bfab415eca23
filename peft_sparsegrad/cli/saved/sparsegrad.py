"""The layers of a saved SparseGrad adapter, with what the file does not say worked out from the settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.utils.other import get_pattern_key

from ...functional import core_shape, delta_weight, unpack_support
from ...sparsegrad import SparseGradConfig
from ..errors import InputError
from .adapter import SavedAdapter, grouped_by_module
from .weight_shape import CoreSizes, weight_shape

PARTS = ("values", "support.packed", "support.settled", "support.counted", "basis.U", "basis.V")


@dataclass(frozen=True)
class SavedLayer:
    """One layer of a saved SparseGrad adapter.

    Attributes:
        adapter: Where its tensors are.
        module: Name of the module in the base model.
        role: The name with its numbers replaced by `*`.
        parts: What there is of `PARTS`, by the name of the tensor.
        owner: The parts of the layer that holds the transition matrices of the group.
        ranks: Columns of (V, U); None for a side in the weight's own basis.
        weight_shape: (out, in), or None if the files do not tell it.
    """

    adapter: SavedAdapter
    module: str
    role: str
    parts: Mapping[str, str]
    owner: Mapping[str, str]
    ranks: tuple[int | None, int | None]
    weight_shape: tuple[int, int] | None

    @property
    def group(self) -> tuple[Any, ...]:
        """The same for layers with the same transition matrices."""
        return self.role, self.weight_shape, self.ranks, self.owner.get("basis.U"), self.owner.get("basis.V")

    @property
    def k(self) -> int:
        """Values in the file."""
        return self.adapter.tensors[self.parts["values"]].numel

    @property
    def core_shape(self) -> tuple[int, int] | None:
        """(r_out, r_in), or None if the files do not tell it."""
        return None if self.weight_shape is None else core_shape(*self.weight_shape, self.ranks)

    def values(self) -> torch.Tensor:
        """Shape (k,), float32."""
        return self.adapter.tensor(self.parts["values"]).float()

    def number(self, part: str) -> int:
        """The single number in `support.settled` or `support.counted`; 0 where there is none."""
        return int(self.adapter.tensor(self.parts[part]).item()) if part in self.parts else 0

    def matrix(self, name: str) -> torch.Tensor | None:
        """U (in, r_in) or V (out, r_out), or None for the identity."""
        tensor = self.owner.get(f"basis.{name}")
        return None if tensor is None else self.adapter.tensor(tensor)

    def indices(self) -> torch.Tensor | None:
        """Sorted flat positions in the core, int64 (k,), or None where the whole core trains.

        Raises:
            InputError: If the support is damaged.
        """
        if "support.packed" not in self.parts:
            return None
        packed = self.adapter.tensor(self.parts["support.packed"])
        try:
            return unpack_support(packed, self._entries_in(packed), self.k)
        except ValueError as error:
            raise InputError(f"{self.adapter.weights_path} is damaged at {self.module!r}: {error}") from error

    def _entries_in(self, packed: torch.Tensor) -> int:
        """Entries of the core, or as many as the positions could belong to: the bits past the last are zero."""
        shape = self.core_shape
        if shape is not None:
            return shape[0] * shape[1]
        return 8 * packed.numel() if packed.dtype is torch.uint8 else 1 << 31

    def delta(self, weight_shape: tuple[int, int]) -> torch.Tensor:
        """`V S Uᵀ`, shape (out, in), float32, of a weight of that shape.

        Raises:
            InputError: If the adapter is for a weight of another shape.
        """
        layer = replace(self, weight_shape=weight_shape)
        U, V = self.matrix("U"), self.matrix("V")
        rows = [len(matrix) for matrix in (V, U) if matrix is not None]
        sizes = [size for size, matrix in zip(weight_shape, (V, U), strict=True) if matrix is not None]
        if rows != sizes or self.weight_shape not in (None, weight_shape):
            raise InputError(f"{self.adapter.folder}: {self.module!r} is not for a weight of shape {weight_shape}")
        shape = core_shape(*weight_shape, self.ranks)
        return delta_weight(self.values(), layer.indices(), U, V, shape)


def saved_layers(adapter: SavedAdapter) -> list[SavedLayer]:
    """The layers of a SparseGrad adapter, in natural order.

    Raises:
        InputError: If the settings or the names of the tensors are not those of a SparseGrad adapter.
    """
    config = read_config(adapter)
    modules = grouped_by_module(list(adapter.tensors), "sparsegrad_")
    if not modules:
        raise InputError(f"{adapter.weights_path} holds no tensor of SparseGrad")
    for module, parts in modules.items():
        if "values" not in parts or not parts.keys() <= set(PARTS):
            raise InputError(f"{adapter.weights_path} is damaged: {module!r} has the tensors {sorted(parts)}")
    owners = {module: parts for module, parts in modules.items() if "basis.U" in parts or "basis.V" in parts}
    return [_saved_layer(adapter, config, module, parts, owners) for module, parts in modules.items()]


def read_config(adapter: SavedAdapter) -> SparseGradConfig:
    """The settings, with every check that they have."""
    try:
        config = SparseGradConfig.from_pretrained(str(adapter.folder))
    except (TypeError, ValueError) as error:
        raise InputError(f"the settings in {adapter.folder} cannot be used: {error}") from error
    assert isinstance(config, SparseGradConfig)
    return config


def _saved_layer(
    adapter: SavedAdapter,
    config: SparseGradConfig,
    module: str,
    parts: Mapping[str, str],
    owners: Mapping[str, Mapping[str, str]],
) -> SavedLayer:
    owner = _owner(adapter, config, module, owners)
    U, V = (adapter.tensors[owner[key]].shape if key in owner else None for key in ("basis.U", "basis.V"))
    sizes = CoreSizes(
        U=None if U is None else (U[0], U[1]),
        V=None if V is None else (V[0], V[1]),
        values=adapter.tensors[parts["values"]].numel,
        packed=adapter.tensors[parts["support.packed"]] if "support.packed" in parts else None,
    )
    density, rank = density_and_rank(config, module)
    shape = weight_shape(sizes, density, config.num_values, rank, config.slack)
    return SavedLayer(adapter, module, _role(config, module), parts, owner, sizes.ranks, shape)


def _role(config: SparseGradConfig, module: str) -> str:
    return module if config.basis == "svd" else re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", module)


def _owner(
    adapter: SavedAdapter, config: SparseGradConfig, module: str, owners: Mapping[str, Mapping[str, str]]
) -> Mapping[str, str]:
    """The parts of the layer whose transition matrices `module` uses: of its role, and of its rank and density."""
    if module in owners or config.basis == "identity":
        return owners.get(module, {})
    wanted = _role(config, module), density_and_rank(config, module)
    found = [name for name in owners if (_role(config, name), density_and_rank(config, name)) == wanted]
    if len(found) != 1:
        raise InputError(
            f"{adapter.weights_path} is damaged: {module!r} may use the transition matrices of {len(found)} layers"
        )
    return owners[found[0]]


def density_and_rank(config: SparseGradConfig, module: str) -> tuple[float, Any]:
    """What the settings ask for in one module."""
    density = config.density_pattern.get(get_pattern_key(list(config.density_pattern), module), config.density)
    return density, config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), module), config.rank)
