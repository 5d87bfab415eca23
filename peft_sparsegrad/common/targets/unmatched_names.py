"""Names in a configuration that no module of the model has: the warning, and the end of PEFT's error."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from .experts_left_out import experts_meant
from .linear_layers import linear_roles, shortest_endings
from .modules import base_modules

_OF_PEFT = {"classifier", "score", "qa_outputs"}  # added to `modules_to_save` by the task type, whether there or not


def unmatched(names: Any, module_names: Iterable[str]) -> list[str]:
    """Return those of a list of names that are neither the name of a module nor its end; none of a text or None."""
    if names is None or isinstance(names, str):
        return []
    dotted = [f".{each}" for each in module_names]
    return sorted(name for name in names if not any(each.endswith(f".{name}") for each in dotted))


def warn_of_unmatched(model: nn.Module, config: Any) -> None:
    """Warn of names in `target_modules` and `modules_to_save` that no module has, with similar names of the model.

    PEFT says nothing of them where another name matches. A list for models of several types is a reason to have them.
    """
    modules = [name for name, _ in base_modules(model)]
    wrong = unmatched(config.target_modules, modules)
    if wrong and len(wrong) < len(config.target_modules):  # else PEFT refuses it
        _warn("target_modules", wrong, "so no such module is adapted", _hint(model, config, wrong))
    wrong = [name for name in unmatched(config.modules_to_save, modules) if name not in _OF_PEFT]
    if wrong:
        _warn("modules_to_save", wrong, "so no such module is trained or saved", similar_names(model, wrong))


def why_none_matches(model: nn.Module, config: Any) -> str:
    """Return sentences on why no module is a target: its block is left out, or no module has such a name."""
    wrong = unmatched(config.target_modules, [name for name, _ in base_modules(model)])
    if wrong or isinstance(config.target_modules, str) or config.layers_to_transform is None:
        return _hint(model, config, wrong)
    return (
        f"The names are right, but `layers_to_transform={config.layers_to_transform}` with "
        f"`layers_pattern={config.layers_pattern}` leaves none of these modules: blocks are counted from 0."
    )


def _hint(model: nn.Module, config: Any, wrong: list[str]) -> str:
    """Return sentences on what to set in place of wrong names in `target_modules`, which may mean fused experts."""
    targets = config.target_modules
    experts = experts_meant(model, targets if isinstance(targets, str) else wrong)
    others = [name for name in wrong if name not in experts]
    if not experts:
        return similar_names(model, wrong)
    modules = [] if isinstance(targets, str) else sorted(name for name in targets if name not in experts)
    parameters = sorted({*(config.target_parameters or ()), *(each for names in experts.values() for each in names)})
    sentence = (
        "The weights of the model's experts are parameters and no modules: to train them, set "
        f"target_modules={modules} and target_parameters={parameters}."
    )
    return f"{sentence} {similar_names(model, others)}" if others else sentence


def similar_names(model: nn.Module, names: Iterable[str]) -> str:
    """Return a sentence with names of modules that resemble `names` or, failing that, those of the linear layers."""
    near: dict[str, None] = {}
    for name in names:
        parts = name.count(".") + 1
        endings = dict.fromkeys(".".join(each.split(".")[-parts:]) for each, _ in base_modules(model))
        near.update(dict.fromkeys(difflib.get_close_matches(name, endings, n=3, cutoff=0.6)))
    if near:
        return f"Similar names in the model are {', '.join(map(repr, near))}."
    layers = shortest_endings(model, linear_roles(model))
    return f"The names of its linear layers end in {', '.join(map(repr, layers))}." if layers else ""


def _warn(field: str, wrong: list[str], consequence: str, hint: str) -> None:
    warnings.warn(
        f"`{field}` names {', '.join(map(repr, wrong))}, which the model does not have, {consequence}: change the "
        f"name or leave it out. {hint}".rstrip(),
        stacklevel=2,
    )
