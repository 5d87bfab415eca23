"""The part of an adapter that is on one layer: a module with everything that trains, is saved or is observed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn

from ..common.derived import Derived
from ..common.optimizer_watcher import OptimizerStep, watch
from ..functional import (
    Core,
    delta_product,
    move_entries,
    observe_gradient,
    pack_support,
    spread_support,
    unpack_support,
)
from .basis import Basis
from .plan import LayerPlan
from .renewal import move_state, next_renewal, renewed_support

# Called in the backward pass with (adapter, x (tokens, in), dy (tokens, out)); returns whether it could use them.
Observer: TypeAlias = "Callable[[LayerAdapter, torch.Tensor, torch.Tensor], bool]"


class LayerAdapter(nn.Module):
    """The delta `V S Uᵀ` of one adapter on one layer.

    All state that a checkpoint must carry is in parameters and persistent buffers whose shapes are fixed when the
    adapter is injected. They are written to in place, so that every holder of the tensors sees the change.

    Args:
        plan: Shapes and settings of the adapter on this layer.
        values: Initial values, shape (k,); with a dynamic support (r_out * r_in,).
        basis: Basis of the layer's group, which another module registers once for the group.

    Attributes:
        values: Parameter with the trained entries of the core S, in the order of `indices`.
        support: Positions of the values as a bit mask or int32 indices, see `pack_support`; None for a dense core.
        weight_shape: Shape (out, in) of the weight as int32 (2,), which a reader of the file cannot infer from the
            other tensors.
        steps: Number of optimizer steps taken since the support was chosen, int64 (1,); -1 until then. It is in the
            state dict because `load_adapter` into an existing name does not read the configuration again.
        warmup: Observer of the gradients until the support is settled, or None.
        probe: Observer of the gradients after the support is settled, or None.
        skip_zeros: True to leave zero rows of the output's gradient out of products, see `delta_product`. Only a
            benchmark sets it.
    """

    support: torch.Tensor | None
    weight_shape: torch.Tensor
    steps: torch.Tensor
    basis: Basis

    def __init__(self, plan: LayerPlan, values: torch.Tensor, basis: Basis) -> None:
        super().__init__()
        self.plan = plan
        self.values = nn.Parameter(values)
        packed = None if plan.dynamic else pack_support(spread_support(plan.num_entries, plan.k), plan.num_entries)
        self.register_buffer("support", packed)
        self.register_buffer("weight_shape", torch.tensor(plan.weight_shape, dtype=torch.int32))
        self.register_buffer("steps", torch.tensor([-1 if plan.warmup_steps else 0]))
        object.__setattr__(self, "basis", basis)  # a plain reference: the basis is no part of this module's state
        self.warmup: Observer | None = None
        self.probe: Observer | None = None
        self.skip_zeros = False
        self._indices = Derived(partial(unpack_support, num_entries=plan.num_entries, k=plan.k))
        self._num_steps, self._is_settled = Derived(_first), Derived(_is_not_negative)
        self._gradient_sum: torch.Tensor | None = None
        self._last_gradient: tuple[weakref.ref[torch.Tensor], int] | None = None
        watch(self)

    @property
    def indices(self) -> torch.Tensor | None:
        """Sorted flat positions of the values in the core, int64 (k,), or None for a dense core."""
        return None if self.support is None else self._indices.of(self.support)

    @property
    def is_settled(self) -> bool:
        """True once the basis is final and the support was chosen."""
        return self._is_settled.of(self.steps)

    @property
    def num_steps(self) -> int:
        """Number of optimizer steps taken since the support was chosen; -1 until then."""
        return self._num_steps.of(self.steps)

    @property
    def gradient_sum(self) -> torch.Tensor | None:
        """Sum over the backward passes since the last renewal, see `SUPPORT_SCORES`: float32 (r_out, r_in).

        It is None if the values do not train or the support is not renewed. It is not a buffer, because DDP would
        overwrite it with that of rank 0, and each rank sums over its own share of the batches.
        """
        if not self.plan.renewal_steps or not self.values.requires_grad:
            return None
        if self._gradient_sum is None or self._gradient_sum.device != self.values.device:
            self._place_gradient_sum()  # pyright: ignore[reportCallIssue]
        return self._gradient_sum

    @torch.compiler.disable  # a compiled graph cannot write to a tensor that it has made itself
    def _place_gradient_sum(self) -> None:
        """Put the gradient sum on the device of the values, and begin with zeros if there is none."""
        if self._gradient_sum is None or self._gradient_sum.is_meta:
            self._gradient_sum = torch.zeros(self.plan.core_shape, dtype=torch.float32, device=self.values.device)
        else:
            self._gradient_sum = self._gradient_sum.to(self.values.device)

    @property
    def core(self) -> Core:
        """The core with its transition matrices."""
        return Core(
            values=self.values,
            indices=self.indices,
            U=self.basis.U,
            V=self.basis.V,
            shape=self.plan.core_shape,
            top_k=self.plan.top_k,
            gradient_sum=self.gradient_sum if torch.is_grad_enabled() else None,
            score=self.plan.support_score,
        )

    @property
    def observer(self) -> Observer | None:
        """The observer of the layer's gradient in the next backward pass."""
        observer: Observer | None = self.probe if self.is_settled else self.warmup
        return observer if torch.is_grad_enabled() and self.values.requires_grad else None

    def add_delta(self, result: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return `result + ((x U) Sᵀ) Vᵀ` for x (..., in) and result (..., out), and let the observer see x and dy."""
        observer = self.observer
        if observer is not None and not self.is_settled:  # the values are and stay zero: no delta to add
            return _observe(self, result, x, observer, True)  # pyright: ignore[reportCallIssue]
        result = delta_product(result, x, self.core, self.skip_zeros)
        if observer is None:
            return result
        return _observe(self, result, x, observer, False)  # pyright: ignore[reportCallIssue]

    @torch.no_grad()
    def settle(self, indices: torch.Tensor | None = None) -> None:
        """Make the support final, and replace its indices in place if new ones are given.

        Args:
            indices: Sorted positions (k,); None keeps the present ones.
        """
        if indices is not None:
            assert self.support is not None, "a dense core has no indices"
            self.support.copy_(pack_support(indices, self.plan.num_entries))
        self.steps.clamp_(min=0)
        # Now, and not in a compiled forward pass, whose graph they would break.
        _ = self.indices, self.is_settled, self.gradient_sum

    def unsettle(self) -> None:
        """Mark the support as not chosen, so that a warm-up can choose it again."""
        self.steps.fill_(-1)

    def before_step(self, step: OptimizerStep) -> Callable[[], None] | None:
        """Return `_after_step` for an optimizer that holds the values of a support that is renewed, else None."""
        if self.gradient_sum is None or not step.updates(self.values):
            return None
        return partial(self._after_step, step.optimizer)

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Count a step, and renew the support if a renewal is due."""
        if self.values.grad is None or not self.is_settled or not self._is_new(self.values.grad):
            return  # optimizers skip values without a gradient, for instance those of a frozen adapter
        taken = self.num_steps + 1
        self.steps.fill_(taken)
        self._num_steps.remember(self.steps, taken)
        self._is_settled.remember(self.steps, True)
        if taken == next_renewal(taken - 1, self.plan.renewal_steps):
            self._renew(optimizer)

    def _renew(self, optimizer: torch.optim.Optimizer) -> None:
        gradient_sum, old = self.gradient_sum, self.indices
        assert gradient_sum is not None
        assert old is not None
        new = renewed_support(self.plan, self.values, old, gradient_sum)
        move_state(optimizer, self.values, old, new)
        self.values.copy_(move_entries(self.values, old, new))
        self.settle(new)
        gradient_sum.zero_()

    def _is_new(self, gradient: torch.Tensor) -> bool:
        """Return whether this gradient was not counted yet, as an optimizer may wrap another that steps as well."""
        last, version = self._last_gradient or (None, 0)
        if last is not None and last() is gradient and version == gradient._version:
            return False
        self._last_gradient = (weakref.ref(gradient), gradient._version)
        return True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if f"{prefix}values" in state_dict:
            self._gradient_sum = None  # it belongs to the earlier values

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last_gradient": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        watch(self)  # a copy trains by itself


def _first(steps: torch.Tensor) -> int:
    return int(steps.item())


def _is_not_negative(steps: torch.Tensor) -> bool:
    return int(steps.item()) >= 0


@torch.compiler.disable
def _observe(
    adapter: LayerAdapter, result: torch.Tensor, x: torch.Tensor, observer: Observer, blocks: bool
) -> torch.Tensor:
    return observe_gradient(result, x, adapter.values, lambda x, dy: observer(adapter, x, dy), blocks)
