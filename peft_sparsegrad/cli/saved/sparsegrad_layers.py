"""The layers of a saved SparseGrad adapter, with plans made from its settings and the weights' shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft import PeftConfig

from ...functional import Core, is_selection, unpack_support
from ...sparsegrad import SparseGradConfig
from ...sparsegrad.plan import LayerPlan, plan_weight
from ...sparsegrad.stored_layer import basis_like
from ..errors import InputError
from .adapter import SavedAdapter, grouped_by_module

_NEEDED = {"adapter.values", "adapter.weight_shape", "adapter.steps"}
_PARTS = {*_NEEDED, "adapter.support", "basis.U", "basis.V"}


@dataclass(frozen=True)
class SavedLayer:
    """One layer of a saved SparseGrad adapter.

    Attributes:
        adapter: Where its tensors are.
        plan: Its plan, made from the settings and the weight's shape as it was for training.
        parts: Names of its tensors, by what they are.
        basis: Names of the tensors `basis.U` and `basis.V` of its group, each unless it is the identity.
    """

    adapter: SavedAdapter
    plan: LayerPlan
    parts: Mapping[str, str]
    basis: Mapping[str, str]

    @property
    def num_values(self) -> int:
        """Values in the file."""
        return self.adapter.tensors[self.parts["adapter.values"]].numel

    @property
    def steps(self) -> int:
        """Optimizer steps that the values have taken; -1 before the warm-up is over."""
        return int(self.adapter.tensor(self.parts["adapter.steps"]).item())

    def values(self) -> torch.Tensor:
        """Shape (k,), float32."""
        return self.adapter.tensor(self.parts["adapter.values"]).float()

    def matrix(self, name: str) -> torch.Tensor | None:
        """U (in, r_in) or V (out, r_out), float32, or None for the identity; U may be a choice of columns (r_in,)."""
        if f"basis.{name}" not in self.basis:
            return None
        side = self.adapter.tensor(self.basis[f"basis.{name}"])
        return side if is_selection(side) else side.float()

    def indices(self) -> torch.Tensor | None:
        """Sorted flat positions in the core, int64 (k,), or None where the whole core trains.

        Raises:
            InputError: If the support is damaged.
        """
        if self.plan.dynamic:
            return None
        packed = self.adapter.tensor(self.parts["adapter.support"])
        try:
            return unpack_support(packed, self.plan.num_entries, self.num_values)
        except ValueError as error:
            raise InputError(f"{self.adapter.weights_path} is damaged at {self.plan.name!r}: {error}") from error

    def core(self) -> Core:
        """The core with its basis, float32."""
        return Core(
            values=self.values(),
            indices=self.indices(),
            U=self.matrix("U"),
            V=self.matrix("V"),
            shape=self.plan.core_shape,
            in_features=self.plan.weight_shape[1],
        )

    def check(self) -> None:
        """Raise an InputError unless the sizes in the file are those of the plan."""
        plan, tensors = self.plan, self.adapter.tensors
        values = plan.num_entries if plan.dynamic else plan.k
        wanted: dict[str, tuple[int, ...]] = {"adapter.values": (values,), "adapter.steps": (1,)}
        like = basis_like("basis.", plan.weight_shape, plan.ranks, plan.selects_columns)
        wanted |= {side: tuple(tensor.shape) for side, tensor in like.items()}
        names = {**self.basis, **self.parts}
        for part, shape in wanted.items():
            found = tensors[names[part]].shape if part in names else None
            if found != shape:
                raise InputError(
                    f"{self.adapter.weights_path} is damaged: `{part}` of {plan.name!r} should have the shape {shape}"
                    + (", and is missing" if found is None else f", not {found}")
                )
        if ("adapter.support" in self.parts) == plan.dynamic:
            raise InputError(f"{self.adapter.weights_path} is damaged: {plan.name!r} has the tensors {sorted(names)}")
        self._check_steps()

    def _check_steps(self) -> None:
        """Raise an InputError unless `steps` is a count that training can have written."""
        steps = self.adapter.tensor(self.parts["adapter.steps"])
        if steps.dtype != torch.int64 or int(steps) < -1:
            raise InputError(
                f"{self.adapter.weights_path} is damaged: `adapter.steps` of {self.plan.name!r} should be a whole "
                f"number (int64) of at least -1, not {steps.tolist()[0]} ({steps.dtype}); save the adapter again"
            )


def read_layers(adapter: SavedAdapter) -> dict[str, SavedLayer]:
    """Read the layers by module, in natural order.

    Raises:
        InputError: If the settings, or the names and sizes of the tensors, are not those of a SparseGrad adapter.
    """
    config = read_config(adapter)
    modules = grouped_by_module(list(adapter.tensors), "sparsegrad_")
    if not modules:
        raise InputError(f"{adapter.weights_path} holds no tensor of SparseGrad")
    plans = {module: _plan(adapter, config, module, parts) for module, parts in modules.items()}
    bases = {plan.group_key: modules[module] for module, plan in plans.items() if _owns_basis(modules[module])}
    layers = {
        module: SavedLayer(adapter, plan, modules[module], _basis_of(bases.get(plan.group_key, {})))
        for module, plan in plans.items()
    }
    for layer in layers.values():
        layer.check()
    return layers


def read_config(adapter: SavedAdapter) -> SparseGradConfig:
    """Read the settings, with every check that they have."""
    try:
        config = PeftConfig.from_pretrained(str(adapter.folder))
    except (TypeError, ValueError) as error:
        raise InputError(f"the settings in {adapter.folder} cannot be used: {error}") from error
    assert isinstance(config, SparseGradConfig)
    return config


def _plan(adapter: SavedAdapter, config: SparseGradConfig, module: str, parts: Mapping[str, str]) -> LayerPlan:
    if not _NEEDED <= parts.keys() <= _PARTS:
        raise InputError(f"{adapter.weights_path} is damaged: {module!r} has the tensors {sorted(parts)}")
    shape = adapter.tensor(parts["adapter.weight_shape"])
    if shape.dtype != torch.int32 or shape.shape not in ((2,), (3,)) or bool((shape < 1).any()):
        raise InputError(f"{adapter.weights_path} is damaged: the weight shape of {module!r} is {shape}")
    try:
        return plan_weight(config, module, tuple(shape.tolist()))
    except ValueError as error:
        raise InputError(f"{adapter.folder}: the settings do not fit the weights: {error}") from error


def _owns_basis(parts: Mapping[str, str]) -> bool:
    return "basis.U" in parts or "basis.V" in parts


def _basis_of(parts: Mapping[str, str]) -> dict[str, str]:
    return {part: name for part, name in parts.items() if part.startswith("basis.")}
