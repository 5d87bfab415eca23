"""The linear layers of a model by role, and the error for a model whose default targets are not known."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel

from .modules import base_modules, exact_targets, in_out_features, is_linear, role_of
from .unusual_layers import problem_of


@dataclass
class Role:
    """The linear layers of one shape that correspond to each other in the blocks of a model.

    Attributes:
        name: Their name with its numbers replaced by `*`.
        shape: Numbers of input and output features.
        layers: Names of the layers.
    """

    name: str
    shape: tuple[int, int]
    layers: list[str] = field(default_factory=list)

    @property
    def is_repeated(self) -> bool:
        """True if the layers are in numbered blocks."""
        return "*" in self.name

    def __str__(self) -> str:
        return f"{self.name} ({len(self.layers)} of {self.shape[0]} to {self.shape[1]})"


def linear_roles(model: nn.Module) -> list[Role]:
    """Return the roles of the linear layers that an adapter can be added to, in the model's order.

    The output layer is left out, as PEFT's "all-linear" does: its weight is often the embedding's too.
    """
    roles: dict[tuple[str, tuple[int, int]], Role] = {}
    output_layer = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    for name, module in base_modules(model):
        if module is not output_layer and is_linear(module) and problem_of(name, module, model) is None:
            key = (role_of(name), in_out_features(module))
            roles.setdefault(key, Role(*key)).layers.append(name)
    return list(roles.values())


def no_default(reason: str, model: nn.Module) -> ValueError:
    """Return the error for a model without default targets, with a setting that fits the model's own layers.

    Args:
        reason: Why there are none, a sentence without its end.
        model: The base model.
    """
    start = f"Please specify `target_modules` in `peft_config`: {reason}."
    roles = linear_roles(model)
    if not roles:
        return ValueError(f"{start} It has no linear layers.")
    return ValueError(
        f"{start} Its linear layers are {', '.join(map(str, roles))}. Set for example "
        f"target_modules={_proposal(model, roles)!r}."
    )


def shortest_endings(model: nn.Module, roles: Iterable[Role]) -> list[str] | None:
    """Return the shortest ends of the names of some roles' layers that no other module's name has but linear layers.

    Returns:
        Sorted names as a list of `target_modules` takes them; None if a layer's whole name ends another one's.
    """
    linear = {name for role in linear_roles(model) for name in role.layers}
    taken = {end for name, _ in base_modules(model) if name not in linear for end in _endings(name)}
    layers = [name for role in roles for name in role.layers]
    ends = {next((end for end in _endings(name) if end not in taken), None) for name in layers}
    return None if None in ends else sorted(end for end in ends if end is not None)


def _endings(name: str) -> list[str]:
    """Return the ends of a module's name, the shortest first, and those that begin with a number after the others."""
    parts = name.split(".")
    return sorted((".".join(parts[start:]) for start in reversed(range(len(parts)))), key=lambda end: end[0].isdigit())


def _proposal(model: nn.Module, roles: list[Role]) -> list[str] | str:
    """Return names of the linear layers that widen or narrow inside blocks, as those of an MLP do; else of all."""
    repeated = [role for role in roles if role.is_repeated] or roles
    chosen = [role for role in repeated if role.shape[0] != role.shape[1]] or repeated
    names = [name for role in chosen for name in role.layers]
    return shortest_endings(model, chosen) or exact_targets(model, names)
