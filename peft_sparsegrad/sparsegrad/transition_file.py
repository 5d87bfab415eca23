"""Files of transition matrices, with which one warm-up serves a whole search over learning rates."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ..common.files.adapter_file import read_tensors
from ..common.files.atomic import replacing
from ..common.files.checksum import add_checksum
from ..functional import file_dtype, unpack_support
from .adapter import LayerAdapter
from .basis import Basis
from .layer import find_adapter
from .plan import LayerPlan
from .settled import check_settled
from .transition_contents import check_contents, read_contents

FORMAT, VERSION = "peft_sparsegrad.transition_matrices", 2


def save_transition_matrices(model: nn.Module, path: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Save the bases and the supports that a warm-up found, for `SparseGradConfig(transition_matrices=path)`.

    The file takes the place of an earlier one at once, and has a checksum of its tensors.

    Args:
        model: A model with a SparseGrad adapter whose warm-up has finished.
        path: The safetensors file to write.
        adapter_name: Name of the adapter.

    Raises:
        ValueError: If the model has no such adapter, its basis needs no data, or its warm-up has not finished.
    """
    _, adapters = find_adapter(model, adapter_name)
    if adapters[0].plan.basis != "hosvd":
        raise ValueError("only an adapter with basis='hosvd' has transition matrices that are worth a file")
    check_settled(adapters, adapter_name)
    tensors, groups, supports = {}, {}, {}
    for basis, plan in _first_of_groups(adapters).items():
        group = f"group.{len(groups)}"
        groups[group] = {"role": plan.role, "weight_shape": plan.weight_shape, "ranks": plan.ranks}
        tensors.update({f"{group}.{name}": side.to(file_dtype(side)) for name, side in basis.named_buffers()})
    for adapter in adapters:
        plan = adapter.plan
        if adapter.support is not None:
            supports[plan.name] = _description(plan)
            tensors[f"support.{plan.name}"] = adapter.support
    contents = {"groups": groups, "supports": supports}
    metadata = {"format": FORMAT, "version": str(VERSION), "contents": json.dumps(contents)}
    with replacing(path) as partial:
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, partial, metadata)
        add_checksum(partial)


@dataclass
class TransitionFile:
    """Contents of a file that `save_transition_matrices` wrote.

    Attributes:
        path: Path of the file.
        groups: Description of each group: role, weight_shape, ranks.
        supports: Description of each layer's support: k, ranks.
        tensors: `GROUP.U` (in, r_in) and `GROUP.V` (out, r_out), each unless it is the identity, and `support.MODULE`
            (packed).
    """

    path: str
    groups: dict[str, dict[str, Any]]
    supports: dict[str, dict[str, Any]]
    tensors: dict[str, torch.Tensor]

    @classmethod
    def read(cls, path: str) -> TransitionFile:
        """Read a file that `save_transition_matrices` wrote.

        Raises:
            ValueError: If the file is missing, damaged, newer, or of another kind.
        """
        if not os.path.isfile(path):
            raise ValueError(f"`transition_matrices`: there is no file {path!r}")
        try:
            tensors, metadata = read_tensors(path)
        except ValueError as error:
            raise ValueError(f"`transition_matrices`: {error}") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"`transition_matrices`: {path!r} was not written by `save_transition_matrices`")
        version = metadata.get("version", "")
        if not version.isdecimal():
            raise ValueError(
                f"`transition_matrices`: {path!r} is damaged: its format should be a number, not {version!r}"
            )
        if int(version) > VERSION:
            raise ValueError(
                f"`transition_matrices`: {path!r} has format {version}, and this version of "
                f"peft_sparsegrad reads formats up to {VERSION}: upgrade it"
            )
        try:
            groups, supports = read_contents(metadata.get("contents"))
            check_contents(groups, supports, tensors)
        except ValueError as error:
            raise ValueError(f"`transition_matrices`: {path!r} is damaged: {error}") from error
        return cls(path, groups, supports, tensors)

    def check(self, plans: list[LayerPlan]) -> None:
        """Raise a ValueError if the file has no basis, or one that is too narrow, for a planned layer."""
        for plan in plans:
            self._find(plan)

    def apply(self, adapters: list[LayerAdapter]) -> None:
        """Fill in the bases, and each support of matching size and core; other layers still choose their support."""
        for basis, plan in _first_of_groups(adapters).items():
            name, (r_out, r_in) = self._find(plan), plan.ranks
            basis.fill(self._columns(name, "U", r_in), self._columns(name, "V", r_out))
        for adapter in adapters:
            plan = adapter.plan
            if plan.dynamic:
                adapter.settle()
            elif self.supports.get(plan.name) == _description(plan):
                packed = self.tensors[f"support.{plan.name}"]
                adapter.settle(unpack_support(packed, plan.num_entries, plan.k))

    def _find(self, plan: LayerPlan) -> str:
        same_role = {name: group for name, group in self.groups.items() if group["role"] == plan.role}
        if not same_role:
            known = sorted({group["role"] for group in self.groups.values()})
            raise ValueError(
                f"`transition_matrices`: {self.path!r} has no basis for module {plan.name!r}; it was made for {known}"
            )
        for name, group in same_role.items():
            wide_enough = all(map(_holds, group["ranks"], plan.ranks))
            if tuple(group["weight_shape"]) == plan.weight_shape and wide_enough:
                return name
        found = [(group["weight_shape"], group["ranks"]) for group in same_role.values()]
        raise ValueError(
            f"`transition_matrices`: {self.path!r} holds (weight shape, ranks) {found} for module {plan.name!r}, "
            f"which needs weight shape {plan.weight_shape} and at least the ranks {list(plan.ranks)} (None: "
            "that side keeps the weight's own basis): set `rank` and `slack` as they were when the file was made, by "
            'an earlier default rank="narrower", slack=12, or leave `transition_matrices` out'
        )

    def _columns(self, group: str, name: str, rank: int | None) -> torch.Tensor | None:
        return None if rank is None else self.tensors[f"{group}.{name}"][:, :rank]


def _first_of_groups(adapters: list[LayerAdapter]) -> dict[Basis, LayerPlan]:
    """Return the basis of each group with the plan of the group's first layer."""
    plans: dict[Basis, LayerPlan] = {}
    for adapter in adapters:
        plans.setdefault(adapter.basis, adapter.plan)
    return plans


def _holds(found: int | None, wanted: int | None) -> bool:
    """Return whether a side of rank `found` includes one of rank `wanted`; None is the weight's own basis."""
    if found is None or wanted is None:
        return found is wanted
    return found >= wanted


def _description(plan: LayerPlan) -> dict[str, Any]:
    """Return what a file says of a layer's support; a weight that is not of experts has no number of them."""
    experts = {} if plan.experts is None else {"experts": plan.experts}
    return {"k": plan.k, "ranks": list(plan.ranks), **experts}
