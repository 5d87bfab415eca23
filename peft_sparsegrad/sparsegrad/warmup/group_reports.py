"""The report of a warm-up's result, in which the corresponding layers of all blocks are a group."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

from ...common.targets.modules import role_of
from ...functional import Hosvd
from ..adapter import LayerAdapter
from ..basis import Basis
from .report import GroupReport
from .support_sums import SupportSums


def group_reports(
    adapters: list[LayerAdapter], found: dict[Basis, Hosvd], sums: dict[LayerAdapter, SupportSums]
) -> list[GroupReport]:
    """Return the report of each group of layers, also of those that have a basis of their own.

    Args:
        adapters: The adapter on every layer.
        found: The bases that the warm-up has found; without those known before, and on other ranks than 0 empty.
        sums: Sums of the layers, complete; without those that had no gradient.
    """
    groups: dict[Any, list[LayerAdapter]] = {}
    for adapter in adapters:
        plan = adapter.plan
        groups.setdefault((role_of(plan.name), plan.weight_shape, plan.ranks), []).append(adapter)
    return [_report_of(group, found, sums) for group in groups.values()]


def _report_of(
    adapters: list[LayerAdapter], found: dict[Basis, Hosvd], sums: dict[LayerAdapter, SupportSums]
) -> GroupReport:
    plan = adapters[0].plan
    own = [sums[adapter] for adapter in adapters if adapter in sums and sums[adapter].total]
    in_core = {each.adapter.plan.name: each.energy_in_core / each.total for each in own}
    in_support = {each.adapter.plan.name: each.energy_in_support / each.total for each in own}
    num_entries = math.prod(plan.parameter_shape)
    bases = {adapter.basis for adapter in adapters}
    common = found.get(adapters[0].basis) if len(bases) == 1 else None  # bases of their own have no common spectrum
    return GroupReport(
        name=role_of(plan.name),
        num_layers=len(adapters),
        weight_shape=plan.weight_shape,
        core_shape=plan.core_shape,
        num_values=plan.k,
        method=common.method if common else plan.basis,
        energy_in_core=median(in_core.values()) if own else None,
        energy_in_support=median(in_support.values()) if own else None,
        chance_in_core=plan.num_entries / num_entries,
        chance_in_support=plan.k / num_entries,
        core_of_layers=in_core,
        support_of_layers=in_support,
        energy=common.energy if common else None,
        spectrum_in=common.spectrum_in.tolist() if common else [],
        spectrum_out=common.spectrum_out.tolist() if common else [],
    )
