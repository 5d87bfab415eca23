"""The fused experts of a mixture, which are parameters and no modules, and what becomes of them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

from torch import nn

from .linear_layers import linear_roles
from .modules import base_modules


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of fused experts by name: parameters of shape (experts, ., .) in a class of experts."""
    return {
        f"{name.removesuffix('.base_layer')}.{own}" if name else own: parameter
        for name, module in model.named_modules()
        if re.search("expert|moe", type(module).__name__, re.IGNORECASE)
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    }


def expert_names(model: nn.Module) -> list[str]:
    """Return the shortest names for `target_parameters` that mean all fused experts, such as `experts.down_proj`."""
    return sorted({_short(name) for name in expert_parameters(model)})


def experts_meant(model: nn.Module, targets: Iterable[str] | str) -> dict[str, list[str]]:
    """Return the fused experts that names of modules seem to mean, as names for `target_parameters`.

    Args:
        model: The base model.
        targets: Names that no module has, of which `up_proj` means `gate_up_proj` too, and one inside `experts` that
            resembles none of the weights means all of them; or a regular expression that no module's name matches.

    Returns:
        The experts by name or expression, without those that mean none.
    """
    if isinstance(targets, str):
        found = {targets: sorted({_short(each) for each in expert_parameters(model) if re.fullmatch(targets, each)})}
    else:
        names = expert_names(model)
        found = {target: _resembling(target, names) for target in targets}
    return {target: experts for target, experts in found.items() if experts}


def _short(name: str) -> str:
    """Return the end of a name that consists of the last module's and what it holds."""
    return ".".join(name.split(".")[-2:])


def _resembling(target: str, names: list[str]) -> list[str]:
    words = set(target.rpartition(".")[2].split("_"))
    alike = [name for name in names if words <= set(name.rpartition(".")[2].split("_"))]
    return alike or (names if "experts" in target.split(".") else [])


def named_like_experts(model: nn.Module, adapted: Iterable[str]) -> bool:
    """Return whether a module among `adapted` has the name of an expert's weight, `down_proj` for instance."""
    names = {name.rpartition(".")[2] for name in expert_parameters(model)}
    return any(name.rpartition(".")[2] in names for name in adapted)


def warn_of_experts_left_out(model: nn.Module, adapted: Iterable[str], title: str) -> None:
    """Warn of fused experts that an adapter leaves frozen, with their share and the way out.

    Args:
        model: The base model.
        adapted: Names of the modules and parameters that have an adapter.
        title: Name of the method.
    """
    adapted = set(adapted)
    left_out = {name: p.numel() for name, p in expert_parameters(model).items() if name not in adapted}
    if not left_out:
        return
    warnings.warn(
        f"{title} leaves out the fused experts, which hold {_share_of_blocks(model, left_out):.1%} of the parameters "
        f"of the blocks: they stay frozen. To train them, set target_parameters={expert_names(model)}.",
        stacklevel=2,
    )


def warn_of_dense_layers_left_out(model: nn.Module, target_parameters: list[str], tower: str | None) -> None:
    """Warn of MLP layers beside the fused experts, with their share and the setting that trains both.

    They have names like those of the experts' weights, `up_proj` for instance, and are no part of router or attention.

    Args:
        model: The base model, of a type of which only the experts are default targets.
        target_parameters: Names of the parameters that are to have an adapter.
        tower: Name of the part of the model that the default targets lie in, or None.
    """
    experts, start = expert_names(model), f"{tower}." if tower else ""
    roles = [role for role in linear_roles(model) if role.name.startswith(start) and _is_dense(role.name, experts)]
    if not roles:
        return
    modules = dict(base_modules(model))
    sizes = {f"{name}.": sum(p.numel() for p in modules[name].parameters()) for role in roles for name in role.layers}
    ends = sorted({_short(name) for role in roles for name in role.layers})
    targets = rf"{re.escape(start)}.*\.(?:{'|'.join(map(re.escape, ends))})" if tower else ends
    warnings.warn(
        "SparseGrad's default targets in this model are the fused experts alone: the MLP layers "
        f"{', '.join(map(str, roles))} hold {_share_of_blocks(model, sizes):.1%} of the parameters of the blocks and "
        f"stay frozen. To train both, set target_modules={targets!r} and target_parameters={target_parameters}; "
        "target_modules=[] says that the experts alone are meant.",
        stacklevel=2,
    )


def _is_dense(name: str, experts: list[str]) -> bool:
    return bool(_resembling(name, experts)) and not re.search(r"\.(gate|router|\w*attn|\w*attention)\.", name)


def _share_of_blocks(model: nn.Module, sizes: dict[str, int]) -> float:
    """Return the share of the parameters of the blocks that some have, given their sizes by name."""
    lists = {name[: match.start() + 1] for name in sizes if (match := re.search(r"\.\d+\.", name))}
    parameters = model.named_parameters(remove_duplicate=False)  # experts that two stacks share have two names
    return sum(sizes.values()) / sum(p.numel() for name, p in parameters if name.startswith((*lists, *sizes)))
