"""The tensors of one layer and of one basis as files hold them, and the checks that they are not damaged."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..common.files.adapter_file import ADVICE, check_finite, check_tensors
from ..functional import is_older_form, is_selection, pack_support, packed_support_size, unpack_support
from .config import SparseGradConfig
from .plan import LayerPlan, plan_weight

_PEFT_PREFIX = "base_model.model."
_MOST_OFF_ORTHONORMAL = 0.1  # of (UᵀU − I) z, z of ±1; with columns rounded to bfloat16 it stays below 0.02


def check_stored(config: SparseGradConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Check the tensors of an adapter file against its settings, before there is a model.

    Args:
        config: Settings of the adapter.
        tensors: Tensors of the file by name, those of other modules among them.

    Raises:
        ValueError: If a tensor is missing, unknown, of another shape or dtype, or damaged. The message names it.
    """
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, found, part = name.partition(".sparsegrad_")
        if found:
            modules.setdefault(module, {})[part] = tensor
    if not modules:
        raise ValueError(f"no tensor is one of SparseGrad. {ADVICE}")
    plans = {module: _plan(config, module, parts) for module, parts in modules.items()}
    for module, parts in modules.items():
        start, plan = f"{module}.sparsegrad_", plans[module]
        given = {f"{start}{part}": tensor for part, tensor in parts.items() if not part.startswith("basis.")}
        given |= present_support(f"{start}adapter.", plan, given)
        check_tensors(_layer_like(f"{start}adapter.", plan), given)
        check_layer(f"{start}adapter.", plan, given)
    for key in dict.fromkeys(plan.group_key for plan in plans.values()):
        members = [module for module, plan in plans.items() if plan.group_key == key]
        owner = next((module for module in members if _basis_parts(modules[module])), members[0])
        given = {f"{m}.sparsegrad_{part}": modules[m][part] for m in members for part in _basis_parts(modules[m])}
        start, plan = f"{owner}.sparsegrad_basis.", plans[owner]
        check_tensors(basis_like(start, plan.weight_shape, plan.ranks, plan.selects_columns), given)
        for name, side in given.items():
            check_side(name, side, plan.weight_shape)


def values_alone(prefix: str, plan: LayerPlan, given: Mapping[str, torch.Tensor]) -> str | None:
    """Return why a layer's values cannot be loaded without their positions, which renewals change; None if they can.

    Args:
        prefix: Of the layer's adapter in the state dict.
        plan: Shapes and settings of the adapter on the layer.
        given: The state dict.
    """
    if plan.renewal_steps == 0 or f"{prefix}values" not in given or f"{prefix}support" in given:
        return None
    return (
        f"{f'{prefix}values'!r} comes without its support, which says what the values mean and changes in training: "
        "keep the whole `state_dict()`, or `get_peft_model_state_dict(model)`, and not the parameters alone"
    )


def check_weight_shape(start: str, plan: LayerPlan, given: Mapping[str, torch.Tensor]) -> None:
    """Raise a ValueError if the tensors of a layer, under names that begin with `start`, are for another weight."""
    found = given.get(f"{start}weight_shape")
    shape = () if found is None else tuple(found.flatten().tolist())
    if len(shape) in (2, 3) and shape != plan.parameter_shape:
        raise ValueError(
            f"'{start}weight_shape': the adapter is for a weight of {shape}, not {plan.parameter_shape}. {ADVICE}"
        )


def check_layer(start: str, plan: LayerPlan, given: Mapping[str, torch.Tensor]) -> None:
    """Check the numbers in the tensors of one layer, under names that begin with `start`, against its plan."""
    if int(given[f"{start}steps"]) < -1:
        raise ValueError(f"'{start}steps' must be at least -1, not {int(given[f'{start}steps'])}. {ADVICE}")
    if plan.dynamic:
        return
    positions = _positions(f"{start}support", plan, given[f"{start}support"])
    of_expert = (positions // (plan.num_entries // plan.num_experts)).bincount(minlength=plan.num_experts)
    if bool((of_expert != plan.k_of_expert).any()):
        raise ValueError(f"'{start}support' has another number of entries for one expert than for others. {ADVICE}")


def present_support(start: str, plan: LayerPlan, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the support of a layer as it is packed now, by name, if the tensors given have it in an older form.

    Raises:
        ValueError: If it is damaged.
    """
    name = f"{start}support"
    if name not in given or not is_older_form(given[name], plan.num_entries, plan.k):
        return {}
    return {name: pack_support(_positions(name, plan, given[name]), plan.num_entries)}


def _positions(name: str, plan: LayerPlan, packed: torch.Tensor) -> torch.Tensor:
    try:
        return unpack_support(packed, plan.num_entries, plan.k)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}. {ADVICE}") from error


def check_side(name: str, side: torch.Tensor, weight_shape: tuple[int, int]) -> None:
    """Raise a ValueError unless a side of a basis is orthonormal, or chooses columns of the weight (out, in)."""
    if not is_selection(side):
        check_orthonormal(name, side)
    elif not (side[0] >= 0 and side[-1] < weight_shape[1] and bool((side.diff() > 0).all())):
        raise ValueError(f"{name!r} must number columns of a weight of {weight_shape}, ascending. {ADVICE}")


def check_orthonormal(name: str, columns: torch.Tensor) -> None:
    """Raise a ValueError unless the columns (n, r) are finite and, but for rounding, orthonormal.

    It is tested on one vector, since the whole product of a wide basis with itself would take longer than loading it.
    """
    check_finite(name, columns)
    signs = torch.randint(2, (columns.shape[1],), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    columns, signs = columns.float(), signs.to(columns.device)
    error = float((columns.T @ (columns @ signs) - signs).abs().max())
    if not error < _MOST_OFF_ORTHONORMAL:
        raise ValueError(f"the columns of {name!r} are not orthonormal (off by {error:.2g}): the file is damaged.")


def basis_like(
    start: str, weight_shape: tuple[int, int], ranks: tuple[int | None, int | None], selects: bool = False
) -> dict[str, torch.Tensor]:
    """Return tensors of the shape of a basis's V (out, r_out) and U (in, r_in), without content, by name.

    With `selects`, U is a choice of columns, int32 (r_in,).
    """
    if selects:
        return {f"{start}U": torch.empty(ranks[1] or weight_shape[1], dtype=torch.int32, device="meta")}
    sides = zip("VU", weight_shape, ranks, strict=True)
    return {f"{start}{side}": torch.empty(size, rank, device="meta") for side, size, rank in sides if rank is not None}


def _layer_like(start: str, plan: LayerPlan) -> dict[str, torch.Tensor]:
    """Return tensors of the shape of a layer's, without content, by name."""
    parts = {
        "values": ((plan.num_entries if plan.dynamic else plan.k,), torch.float32),
        "weight_shape": ((len(plan.parameter_shape),), torch.int32),
        "steps": ((1,), torch.int64),
    }
    if not plan.dynamic:
        parts["support"] = ((packed_support_size(plan.num_entries, plan.k),), torch.uint8)
    return {f"{start}{part}": torch.empty(shape, dtype=dtype, device="meta") for part, (shape, dtype) in parts.items()}


def _plan(config: SparseGradConfig, module: str, parts: Mapping[str, torch.Tensor]) -> LayerPlan:
    name, shape = f"{module}.sparsegrad_adapter.weight_shape", parts.get("adapter.weight_shape")
    if shape is None:
        raise ValueError(f"the tensor {name!r} of the adapter is missing. {ADVICE}")
    if shape.dtype != torch.int32 or shape.shape not in ((2,), (3,)) or bool((shape < 1).any()):
        raise ValueError(
            f"{name!r} must be two whole numbers (int32) above 0, of experts three, not {shape.tolist()}. {ADVICE}"
        )
    return plan_weight(config, module.removeprefix(_PEFT_PREFIX), tuple(shape.tolist()))


def _basis_parts(parts: Mapping[str, torch.Tensor]) -> list[str]:
    return [part for part in parts if part.startswith("basis.")]
