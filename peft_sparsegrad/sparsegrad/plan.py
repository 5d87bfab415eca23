"""The plan of an adapter on one layer, which is derived from the configuration before anything is changed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from peft.utils.other import get_pattern_key
from torch import nn

from ..common.targets.modules import in_out_features, is_linear, role_of
from ..functional import core_ranks, core_shape, num_trained_values
from .config import SparseGradConfig

BASES_OF_GRADIENTS = ("hosvd", "columns")


@dataclass(frozen=True)
class LayerPlan:
    """Shapes and settings of an adapter on one layer.

    Attributes:
        name: Name of the module in the base model.
        role: Name with its numbers replaced by `*`, which is the same for the corresponding layer of every block.
        weight_shape: Shape (out, in) of the weight.
        experts: Number of experts whose weights (out, in) are in one parameter; None for a weight of its own.
        k: Number of trained values, those of all experts together; with a dynamic support, number of entries updated
            in a step.
        ranks: Columns (r_out, r_in) of V and U; None for a side in the weight's own basis.
        basis: Basis in the configuration: `"hosvd"`, `"columns"`, `"svd"` or `"identity"`.
        dynamic: True if the whole core trains and each step updates the entries with the largest gradients.
        support_score: Score by which a static support is chosen: `"mean"` or `"energy"`.
        warmup_steps: Number of backward passes to observe before training; 0 if the adapter trains from the start.
        renewal_steps: Number of optimizer steps until the support is first renewed; 0 for never.
        init_weights: False fills the values with noise.
    """

    name: str
    role: str
    weight_shape: tuple[int, int]
    experts: int | None
    k: int
    ranks: tuple[int | None, int | None]
    basis: str
    dynamic: bool
    support_score: str
    warmup_steps: int
    renewal_steps: int
    init_weights: bool

    @property
    def selects_columns(self) -> bool:
        """True if the basis of the input side is a choice of the weight's columns."""
        return self.basis == "columns"

    @property
    def basis_needs_data(self) -> bool:
        """True if the basis is found from gradients."""
        return self.basis in BASES_OF_GRADIENTS

    @property
    def group_key(self) -> tuple[str, tuple[int, int], tuple[int | None, int | None]]:
        """Key of the layer's group: layers with the same key share a basis."""
        return self.role, self.weight_shape, self.ranks

    @cached_property
    def core_shape(self) -> tuple[int, int]:
        """Shape (r_out, r_in) of the core; (experts * r_out, r_in) where those of experts lie one below the other."""
        r_out, r_in = core_shape(*self.weight_shape, self.ranks)
        return self.num_experts * r_out, r_in

    @property
    def num_experts(self) -> int:
        """Number of weights that have a core each: 1 for a weight of its own."""
        return self.experts or 1

    @property
    def k_of_expert(self) -> int:
        """Number of trained values of one weight."""
        return self.k // self.num_experts

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Shape (out, in) or (experts, out, in) of the parameter."""
        return self.weight_shape if self.experts is None else (self.experts, *self.weight_shape)

    @property
    def unfolded_shape(self) -> tuple[int, int]:
        """Shape (experts * out, in) of the weights of all experts one below the other."""
        out_features, in_features = self.weight_shape
        return self.num_experts * out_features, in_features

    @property
    def num_entries(self) -> int:
        """Number of entries of the core."""
        return self.core_shape[0] * self.core_shape[1]


def plan_layer(config: SparseGradConfig, name: str, module: nn.Module, **backend_kwargs: Any) -> LayerPlan:
    """Return the plan for the module `name`.

    Raises:
        TypeError: If the module is not a linear layer.
        ValueError: If the values asked for do not fit into its core.
    """
    check_is_linear(name, module, **backend_kwargs)
    in_features, out_features = in_out_features(module)
    return plan_weight(config, name, (out_features, in_features))


def plan_weight(config: SparseGradConfig, name: str, shape: tuple[int, ...]) -> LayerPlan:
    """Return the plan for a linear layer, or a parameter, `name` of the shape (out, in) or (experts, out, in).

    Raises:
        ValueError: If the values asked for do not fit into its core.
    """
    density = config.density_pattern.get(get_pattern_key(list(config.density_pattern), name), config.density)
    rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name), config.rank)
    *stack, out_features, in_features = shape
    weight_shape, experts = (out_features, in_features), stack[0] if stack else None
    k = num_trained_values(*weight_shape, density, config.num_values)
    if config.basis == "identity":
        rank = (None, None)
    elif config.basis == "columns" and isinstance(rank, int):
        rank = (None, rank)
    try:
        ranks = core_ranks(*weight_shape, k, rank, config.slack)
    except ValueError as error:
        size = f"density={density}" if config.num_values is None else f"num_values={config.num_values}"
        raise ValueError(f"module {name!r}, {size}: {error}") from error
    needs_data = config.basis in BASES_OF_GRADIENTS or config.support == "static"
    return LayerPlan(
        name=name,
        role=name if config.basis in ("svd", "columns") else role_of(name),
        weight_shape=weight_shape,
        experts=experts,
        k=(experts or 1) * k,
        ranks=ranks,
        basis=config.basis,
        dynamic=config.support == "dynamic",
        support_score=config.support_score,
        warmup_steps=config.warmup_steps if needs_data and config.init_weights else 0,
        renewal_steps=config.renewal_steps if config.support == "static" else 0,
        init_weights=config.init_weights,
    )


def check_is_linear(name: str, module: nn.Module, **backend_kwargs: Any) -> None:
    """Raise a TypeError unless `module` is a Linear, a Conv1D or a quantised linear layer."""
    if not is_linear(module, **backend_kwargs):
        raise TypeError(
            f"the target module {name!r} is a {type(module).__name__}: SparseGrad adapts torch.nn.Linear, "
            "transformers' Conv1D and quantised linear layers. Change `target_modules` or set `exclude_modules`."
        )
