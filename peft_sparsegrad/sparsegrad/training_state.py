"""One layer in a training run: its steps are counted and its support is renewed, in any training loop."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..common.tracing import is_exporting
from ..common.training.distributed import agree, refuse_join, world_size
from ..common.training.optimizer_watcher import OptimizerStep, is_stepping, watch
from ..common.training.pieces import Piece, is_dtensor
from ..common.training.unseen_steps import UnseenSteps
from .carried_state import CarriedState
from .core_gradient import CoreGradient
from .dynamic_steps import DynamicSteps
from .optimizer_state import carry, has_state, take
from .renewal import next_renewal, renewed_support, reset_state

if TYPE_CHECKING:
    from .adapter import LayerAdapter


class TrainingState:
    """The observer of the optimizer's steps for one layer's adapter.

    A step is counted if an optimizer that holds the values takes it with a gradient of its own backward passes. The
    support is renewed after the step, when nothing else reads the values.

    Args:
        adapter: The adapter on the layer.

    Attributes:
        core_gradient: Gradient of the whole core, by which the next support is chosen.
        carried: What the optimizer's state dict carries of the run.
    """

    def __init__(self, adapter: LayerAdapter) -> None:
        self.adapter, plan = adapter, adapter.plan
        self.core_gradient = CoreGradient(plan.core_shape, plan.support_score, self._positions, self.check_values)
        self.carried = CarriedState(adapter, self.core_gradient)
        if self.is_renewed:
            self.core_gradient.watch(self.values)  # pyright: ignore[reportAttributeAccessIssue]
        self.begin_again()
        watch(self)

    def begin_again(self) -> None:
        """Forget everything about the run, because the values have been replaced."""
        self.core_gradient.clear()
        self._unseen, self._dynamic_steps = UnseenSteps(), DynamicSteps(self.adapter.plan)
        self._optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._renewed: torch.Tensor | None = None
        self.carried.is_gathered = False

    @property
    def values(self) -> nn.Parameter:
        """The values of the layer, shape (k,); of FSDP2 a DTensor outside of forward passes."""
        return self.adapter.values

    @property
    def is_renewed(self) -> bool:
        """True if the support is renewed in this run."""
        return self.adapter.plan.renewal_steps > 0 and self.values.requires_grad

    def leaf(self) -> torch.Tensor | None:
        """Return the leaf that receives the gradient of the whole core, see `Core`, or None if nobody needs it."""
        values = self.values
        renews = self.adapter.plan.renewal_steps > 0 and values.requires_grad
        if not renews or not torch.is_grad_enabled() or is_dtensor(values) or is_exporting():
            return None
        if not torch.compiler.is_compiling():
            refuse_join("the renewal of SparseGrad's supports (`renewal_steps`)")
        return self.core_gradient.leaf(values)

    def before_step(self, step: OptimizerStep) -> Callable[[], None] | None:
        """Prepare for a step of an optimizer that holds the values, and return `_after_step` if it is to be counted.

        Raises:
            RuntimeError: If the state of the optimizer is for other entries, the gradient of the values was not made
                by a backward pass, or earlier values were written over those of a renewal.
        """
        if not step.holds(self.values) or not self.values.requires_grad:
            return None
        piece = step.piece(self.values)
        self._meet(step.optimizer, piece)
        self._unseen.step_seen()
        if not step.updates(self.values):
            return None
        self._check_new_values(step, piece)
        if not self.adapter.is_settled:
            return None
        if self.adapter.plan.dynamic:
            return self._dynamic_steps.before_step(step, piece, self._device)
        if not self.is_renewed:
            return None
        if piece.gradient is None:  # optimizers skip values without a gradient
            self.core_gradient.discard()
            return None
        self._check_gradient(piece, piece.gradient)
        return partial(self.core_gradient.when_complete, partial(self._after_step, step, piece))

    @torch.no_grad()
    def _after_step(self, step: OptimizerStep, piece: Piece) -> None:
        """Count a step, and renew the support if a renewal is due."""
        if not self.core_gradient.commit() and not self._is_of_other_ranks(piece):
            return
        self.carried.is_gathered = False
        taken = self.adapter.count_step()
        if taken == next_renewal(taken - 1, self.adapter.plan.renewal_steps):
            self._agree("renewal")
            step.renewed[id(self.values)] = self._renew({*self._optimizers, *step.optimizers}, piece)

    def _agree(self, what: str) -> None:
        """Check that all ranks have come to the same layer, before collective operations on its tensors."""
        agree(
            f"the {what} of the support of {self.adapter.plan.name!r}",
            self._device,
            "every rank must train every layer, and count the same steps for it; else set `renewal_steps=0`",
        )

    def _is_of_other_ranks(self, piece: Piece) -> bool:
        """Return whether others have a gradient for a layer that this rank's batch has not reached."""
        return world_size() > 1 and piece.gradient is not None and bool(piece.gradient.any())

    def _renew(self, optimizers: set[torch.optim.Optimizer], piece: Piece) -> torch.Tensor:
        """Renew the support, and return which slots have a new entry, whose value is zero; boolean (k,)."""
        old = self._positions()
        values = piece.joined(piece.values, self._device)
        new = renewed_support(values, old, self.core_gradient.score(self._device), self.adapter.plan.num_experts)
        renewed = new != old
        for optimizer in {id(each.state): each for each in optimizers}.values():  # wrappers may share a state
            reset_state(optimizer, piece, renewed)
        piece.values.masked_fill_(piece.cut(renewed), 0.0)
        self.adapter.settle(new)
        self.core_gradient.total, self._renewed = None, renewed
        return renewed

    @property
    def _device(self) -> torch.device:
        """The device of the layer, where collective operations are possible."""
        return self.adapter.steps.device

    def _positions(self) -> torch.Tensor:
        assert self.adapter.indices is not None
        return self.adapter.indices

    def check_values(self) -> None:
        """Raise a RuntimeError if something other than an optimizer that holds the values has changed them."""
        if self._unseen.is_over or is_stepping(self.values):
            return
        if self.values.requires_grad and self.adapter.is_settled and self._unseen.found(self.values):
            dynamic = self.adapter.plan.dynamic
            kept = "only its own optimizer keeps a dynamic support" if dynamic else "a copy cannot follow a renewal"
            setting = "support='static'" if dynamic else "`renewal_steps=0`"
            raise RuntimeError(
                f"the SparseGrad values of {self.adapter.plan.name!r} have changed without a step of an optimizer "
                f"that holds them, and {kept}: give the optimizer the model's own parameters, or set {setting}"
            )

    def _check_new_values(self, step: OptimizerStep, piece: Piece) -> None:
        """Check in the step after a renewal that new values are still zero, as no optimizer has moved them."""
        renewed, self._renewed = self._renewed, None
        if renewed is None or step.repeats_passes:
            return
        if piece.any(piece.values * piece.cut(renewed), self._device):
            raise RuntimeError(
                f"after a renewal of the support of {self.adapter.plan.name!r} something other than an optimizer of "
                "torch has written earlier values over the new ones, slow weights of a wrapper for instance: set "
                "`renewal_steps=0`"
            )

    def _check_gradient(self, piece: Piece, gradient: torch.Tensor) -> None:
        if not self.core_gradient.has_passed and piece.any(gradient, self._device):
            raise RuntimeError(
                f"the gradient of the SparseGrad values of {self.adapter.plan.name!r} was not made by `backward()`, "
                "which is what a renewal of the support goes by: use `loss.backward()`, or set `renewal_steps=0`"
            )

    @torch.no_grad()
    def _meet(self, optimizer: torch.optim.Optimizer, piece: Piece) -> None:
        """Take over what the optimizer's state dict has carried, and let it carry the state of this layer."""
        if self.is_renewed and piece.size != self.adapter.plan.k:
            raise RuntimeError(
                f"the optimizer holds {piece.size} of the {self.adapter.plan.k} values of {self.adapter.plan.name!r}, "
                "cut in a way that a renewal does not know: use FSDP2 or DeepSpeed, or set `renewal_steps=0`"
            )
        if self.is_renewed and is_dtensor(piece.held) and self.core_gradient.has_passed_without_keeper:
            raise RuntimeError(
                f"the values of {self.adapter.plan.name!r} are sharded, and FSDP2's record of their gradient was not "
                "found, by which a renewal adds up micro-batches: set `renewal_steps=0`"
            )
        carried = take(optimizer, piece.held, self.adapter.plan.name)
        if carried is not None:
            self.carried.load(carried, piece)
        if optimizer in self._optimizers:
            return
        if self.is_renewed and not self._optimizers:
            self._agree("first step")
        if carried is None and not self._optimizers and self.carried.was_sorted and has_state(optimizer, piece):
            raise RuntimeError(
                "the optimizer has a state without the order of the SparseGrad values that it belongs to: load one "
                "that `optimizer.state_dict()` of the training run has returned, or begin with a new optimizer, in a "
                "Trainer with `trainer.optimizer = trainer.lr_scheduler = None`"
            )
        self._optimizers.add(optimizer)
        if self.adapter.support is not None:
            carry(optimizer, piece.held, self.adapter.plan.name, self.carried)
