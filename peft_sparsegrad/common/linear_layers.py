"""The linear layers of a model by role, and the error for a model whose default targets are not known."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from .targeting import base_modules, in_out_features, is_linear, role_of
from .unusual_layers import problem_of


@dataclass
class Role:
    """The linear layers that correspond to each other in the blocks of a model.

    Attributes:
        name: Their name with its numbers replaced by `*`.
        shape: Numbers of input and output features of the first one.
        count: Number of such layers.
    """

    name: str
    shape: tuple[int, int]
    count: int

    @property
    def is_repeated(self) -> bool:
        """True if the layers are in numbered blocks."""
        return "*" in self.name

    def __str__(self) -> str:
        return f"{self.name} ({self.count} of {self.shape[0]} to {self.shape[1]})"


def linear_roles(model: nn.Module) -> list[Role]:
    """Return the roles of the linear layers that an adapter can be added to, in the model's order.

    The output layer is left out, as PEFT's "all-linear" does: its weight is often the embedding's too.
    """
    roles: dict[str, Role] = {}
    output_layer = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    for name, module in base_modules(model):
        if module is not output_layer and is_linear(module) and problem_of(name, module, model) is None:
            role = roles.setdefault(role_of(name), Role(role_of(name), in_out_features(module), 0))
            role.count += 1
    return list(roles.values())


def no_default(title: str, model: nn.Module, model_type: str | None) -> ValueError:
    """Return the error for a model without default targets, with a setting that fits the model's own layers."""
    reason = (
        f"Please specify `target_modules` in `peft_config`: {title} has no default for the model type {model_type!r}."
    )
    roles = linear_roles(model)
    if not roles:
        return ValueError(f"{reason} It has no linear layers.")
    return ValueError(
        f"{reason} Its linear layers are {', '.join(map(str, roles))}. Set for example "
        f"target_modules={_proposal(model, roles)}."
    )


def _proposal(model: nn.Module, roles: list[Role]) -> list[str]:
    """Return names of the linear layers that widen or narrow inside blocks, as those of an MLP do; else of all."""
    repeated = [role for role in roles if role.is_repeated] or roles
    chosen = [role for role in repeated if role.shape[0] != role.shape[1]] or repeated
    return sorted({_shortest_name(model, role.name) for role in chosen})


def _shortest_name(model: nn.Module, role: str) -> str:
    """Return the shortest ending of a role's name that only linear layers have."""
    parts = role.rpartition("*.")[2].split(".")
    for length in range(1, len(parts)):
        ending = ".".join(parts[-length:])
        if all(is_linear(module) for name, module in base_modules(model) if f".{name}".endswith(f".{ending}")):
            return ending
    return ".".join(parts)
