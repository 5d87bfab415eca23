"""The part of an adapter that is on one layer: a module with everything that trains, is saved or is observed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..common.derived import Derived
from ..common.kept_buffers import KeptBuffers
from ..common.scaling import ScaledPart
from ..common.training.backward import in_backward
from ..common.training.pieces import refuse_views
from ..functional import (
    Core,
    Side,
    delta_product,
    pack_support,
    spread_support,
    stacked_sum,
    unpack_support,
)
from .basis import Basis
from .observers import Observer, WarmUp, observe_output, observe_weight
from .plan import LayerPlan
from .small_steps import SmallSteps
from .stored_layer import present_support, values_alone
from .training_state import TrainingState

if TYPE_CHECKING:
    from .warmup.report import WarmUpReport


class LayerAdapter(KeptBuffers, ScaledPart):
    """The delta `V S Uᵀ` of one adapter on one layer.

    All state that a copy must carry is in parameters and persistent buffers whose shapes are fixed when the adapter is
    injected. They are written to in place, so that every holder of the tensors sees the change.

    Args:
        plan: Shapes and settings of the adapter on this layer.
        values: Initial values, shape (k,); with a dynamic support (r_out * r_in,).
        basis: Basis of the layer's group, which another module registers once for the group.

    Attributes:
        values: Parameter with the trained entries of the core S, in the order of `indices`.
        support: Positions of the values, see `pack_support`; None for a dense core.
        slots: Rank of each value's position among the sorted positions, int32 (k,); None for a dense core. The
            adapter's file has the values in the order of their positions, and no slots.
        weight_shape: Shape (out, in) of the weight as int32 (2,), or (experts, out, in) as int32 (3,), which a reader
            of the file cannot infer from the other tensors.
        steps: Number of optimizer steps taken since the support was chosen, int64 (1,); -1 until then. It is in the
            state dict because `load_adapter` into an existing name does not read the configuration again.
        training_state: Steps, renewals and the core's gradient in a training run.
        warmup: Observer of the gradients until the support is settled, or None.
        report: Report of the warm-up that has settled the support in this process, or None.
        probe: Observer of the gradients after the support is settled, or None.
        skip_zeros: True to leave zero rows of the output's gradient out of products, see `delta_product`. Only a
            benchmark sets it.
    """

    support: torch.Tensor | None
    slots: torch.Tensor | None
    weight_shape: torch.Tensor
    steps: torch.Tensor
    basis: Basis

    def __init__(self, plan: LayerPlan, values: torch.Tensor, basis: Basis) -> None:
        super().__init__()
        self.plan = plan
        self.values = nn.Parameter(values)
        packed = None if plan.dynamic else pack_support(spread_support(plan.num_entries, plan.k), plan.num_entries)
        self.register_buffer("support", packed)
        slots = None if plan.dynamic else torch.arange(plan.k, dtype=torch.int32, device="cpu")
        self.register_buffer("slots", slots)
        self.register_buffer("weight_shape", torch.tensor(plan.parameter_shape, dtype=torch.int32, device="cpu"))
        self.register_buffer("steps", torch.tensor([-1 if plan.warmup_steps else 0], device="cpu"))
        object.__setattr__(self, "basis", basis)  # a plain reference: the basis is no part of this module's state
        self.warmup: WarmUp | None = None
        self.report: WarmUpReport | None = None
        self.probe: Observer | None = None
        self.small_steps: SmallSteps | None = None  # of all layers, on the last one, so that a copy has them in order
        self.skip_zeros = False
        self._indices = Derived(partial(_indices, num_entries=plan.num_entries, k=plan.k))
        self._num_steps, self._is_settled = Derived(_first), Derived(_is_not_negative)
        self.training_state = TrainingState(self)

    @property
    def indices(self) -> torch.Tensor | None:
        """Flat positions of the values in the core, int64 (k,), or None for a dense core."""
        support, slots = self.support, self.slots
        return None if support is None or slots is None else self._indices.of(support, slots)

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
        """Sum of the core's gradient over the steps since the last renewal, float32 (r_out, r_in); None for zero."""
        return self.training_state.core_gradient.total

    @property
    def core(self) -> Core:
        """The core, times the scale, with its transition matrices."""
        return self._core(self.basis.U, self.basis.V)

    def core_in(self, dtype: torch.dtype) -> Core:
        """Return the core, times the scale, with its transition matrices in the dtype of the products with them."""
        return self._core(*self.basis.sides_in(dtype))

    def _core(self, U: Side, V: Side) -> Core:
        plan = self.plan
        leaf = self.training_state.leaf()
        core = Core(self.values, self.indices, U, V, plan.core_shape, leaf, plan.weight_shape[1])
        return core if self.scale == 1 else core.scaled(self.scale)

    @property
    def observer(self) -> Observer | None:
        """The observer of the layer's gradient in the next backward pass."""
        if self.probe is None and self.warmup is None:
            return None
        observer: Observer | None = self.probe if self.is_settled else self.warmup
        return observer if torch.is_grad_enabled() and self.values.requires_grad else None

    def begin_pass(self) -> None:
        """Note that a forward pass comes to this layer, so that a warm-up that is complete ends before it."""
        if self.warmup is not None and (torch.is_grad_enabled() or self.training) and not in_backward():
            if self.is_settled:  # loaded since the adapter was added
                self.warmup = None
            else:
                self.warmup.enter(self)
        if self.plan.dynamic and self.observer is None and not torch.compiler.is_compiling():
            if torch.is_grad_enabled():
                refuse_views(self.values, "choose the entries of a dynamic support", "set support='static'")
            self.training_state.check_values()

    def add_delta(self, result: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return `result + ((x U) Sᵀ) Vᵀ` for x (..., in) and result (..., out), and let the observer see x and dy."""
        observer = self.observer
        if observer is not None and not self.is_settled:  # the values are and stay zero: no delta to add
            return observe_output(self, result, x, observer, True)  # pyright: ignore[reportCallIssue]
        result = delta_product(result, x, self.core_in(result.dtype), self.skip_zeros)
        if observer is None:
            return result
        return observe_output(self, result, x, observer, False)  # pyright: ignore[reportCallIssue]

    def add_to_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return `weight + V S Uᵀ` of every expert, in the weight's own shape, and let the observer see its gradient.

        Args:
            weight: The parameter, shape (out, in) or (experts, out, in).
        """
        observer, is_settled = self.observer, self.is_settled
        if is_settled or observer is None:
            weight = stacked_sum(weight, self.core, self.plan.num_experts)
        if observer is None:
            return weight
        return observe_weight(self, weight, observer, not is_settled)  # pyright: ignore[reportCallIssue]

    @torch.no_grad()
    def settle(self, indices: torch.Tensor | None = None) -> None:
        """Make the support final, and replace its indices in place if new ones are given.

        Args:
            indices: Position of each value, shape (k,), in any order; None keeps the present ones.
        """
        if indices is not None:
            self.place(indices)
        self.steps.clamp_(min=0)
        self.prepare()

    def prepare(self) -> None:
        """Compute what a forward pass needs to know of the buffers; a compiled one does not look into them.

        It is to be called after every change of the buffers that is no optimizer step.
        """
        if self.values.is_meta or self.steps.is_meta:
            return
        if self.is_settled:
            _ = self.indices, self.training_state.leaf()

    def place(self, indices: torch.Tensor) -> None:
        """Replace the position of each value, shape (k,), in place; the values stay in their slots."""
        assert self.support is not None, "a dense core has no indices"
        assert self.slots is not None
        indices = indices.to(self.slots.device)  # supports are chosen on the CPU
        order = indices.argsort()
        self.support.copy_(pack_support(indices[order], self.plan.num_entries))
        self.slots[order] = torch.arange(len(order), dtype=torch.int32, device=order.device)

    @torch.no_grad()
    def copy_buffers(self, other: LayerAdapter) -> None:
        """Take over basis, support, slots and steps of an adapter with the same plan; the values stay."""
        for own, theirs in ((self, other), (self.basis, other.basis)):
            for name, buffer in own.named_buffers():
                buffer.copy_(theirs.get_buffer(name))
        self.prepare()

    def unsettle(self) -> None:
        """Mark the support as not chosen, so that a warm-up can choose it again."""
        self.steps.fill_(-1)

    def count_step(self) -> int:
        """Count an optimizer step, and return the number of steps since the support was chosen."""
        taken = self.num_steps + 1
        self.steps.fill_(taken)
        self._num_steps.remember(taken, self.steps)
        self._is_settled.remember(True, self.steps)
        return taken

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if repacked := present_support(prefix, self.plan, state_dict):
            state_dict = {**state_dict, **repacked}
        has_buffers = not self.values.is_meta  # else they wait for the values, and are in no state dict
        if has_buffers and (error := values_alone(prefix, self.plan, state_dict)):
            args[-1].append(error)  # the list of errors, which torch raises together in the end
            state_dict = {name: tensor for name, tensor in state_dict.items() if name != f"{prefix}values"}
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}values" in state_dict:
            self.training_state.begin_again()  # it belongs to the earlier values
        if all(f"{prefix}{name}" in state_dict for name, _ in self.named_buffers()):
            self.prepare()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> LayerAdapter:
        was_known, before = self._is_settled.knows(self.steps), list(self.buffers())
        super()._apply(fn, recurse)
        if was_known and all(map(_have_same_content, before, self.buffers())):  # `to_empty` leaves anything in them
            self.prepare()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "training_state": self.training_state.core_gradient.total}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.training_state = TrainingState(self)  # a copy trains by itself
        self.training_state.core_gradient.total = state["training_state"]


def _indices(support: torch.Tensor, slots: torch.Tensor, num_entries: int, k: int) -> torch.Tensor:
    return unpack_support(support, num_entries, k)[slots.long()]


def _have_same_content(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one is other or (not (one.is_meta or other.is_meta) and torch.equal(one.to(other.device), other))


def _first(steps: torch.Tensor) -> int:
    return int(steps.item())


def _is_not_negative(steps: torch.Tensor) -> bool:
    return int(steps.item()) >= 0
