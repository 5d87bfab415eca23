"""The gradient of a whole core, which chooses the entries of the next support.

Nobody knows in a backward pass whether a step will be taken with it. A loop may skip the step of a batch whose loss is
NaN, a gradient scaler one that overflowed; a pass may serve a saliency map or a norm for the log. So the gradient is
pending until the step. Autograd itself says which passes are to be added up: the gradient of the values begins anew
when the loop has set it to None or zero.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import nn

from ..common.training.backward import backward_id
from ..common.training.distributed import mean_over_ranks, sum_over_ranks
from ..common.training.kept_gradient import Keeper, keeper_of
from ..common.training.pieces import refuse_views
from ..common.training.zero import is_managed
from ..functional import SUPPORT_SCORES


class CoreGradient:
    """Sum of a core's gradient over the steps since the last renewal, and over the passes since the last step.

    Args:
        shape: Shape (r_out, r_in) of the core.
        score: Key of `SUPPORT_SCORES`, which says what of a pass is added up.
        indices: Called without arguments; returns the positions of the values, shape (k,).
        on_pass: Called in each backward pass that adds to the gradient of the values.

    Attributes:
        total: Sum over the steps since the last renewal, float32 (r_out, r_in); None for zero. It is not a buffer,
            because DDP would overwrite it with that of rank 0, and each rank sums over its own share of the batches.
        pending: Sum over the passes for which no step was taken yet, (r_out, r_in); None for zero.
        has_passed: True once a backward pass has added to the gradient of the values.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        score: str,
        indices: Callable[[], torch.Tensor],
        on_pass: Callable[[], None],
    ) -> None:
        self._shape, self._score = shape, SUPPORT_SCORES[score]
        self._indices, self._on_pass = indices, on_pass
        self._leaf: torch.Tensor | None = None
        self._values: nn.Parameter | None = None
        self._keeper: Keeper | None = None
        self.clear()

    def clear(self) -> None:
        """Forget every gradient."""
        self.total: torch.Tensor | None = None
        self.pending: torch.Tensor | None = None
        self.has_passed = False
        self._backward, self._parts = -1, {}
        self._last: tuple[weakref.ref[torch.Tensor], int] | None = None
        self._on_complete: Callable[[], None] | None = None

    def leaf(self, values: nn.Parameter) -> torch.Tensor:
        """Return the leaf of the core, see `Core`, for the values that train: it takes the bytes of one entry."""
        if self._leaf is None or self._values is not values or self._leaf.device != values.device:
            self.watch(values)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        if self._keeper is None and is_managed(values):
            self._keeper = keeper_of(values)
        return self._leaf  # pyright: ignore[reportReturnType]

    @torch.compiler.disable  # hooks are put on tensors before a compiled graph uses them
    def watch(self, values: nn.Parameter) -> None:
        """Watch the gradient of the values that train, before others hook an optimizer to it."""
        dtype = torch.promote_types(values.dtype, torch.float32)
        self._leaf = torch.zeros((), dtype=dtype, device=values.device).expand(self._shape).requires_grad_()
        self._leaf.register_post_accumulate_grad_hook(_weakly(self._leaf_accumulated))
        if self._values is not values:
            refuse_views(values, "renew the support of SparseGrad", "set `renewal_steps=0`")
            self._values, self._keeper = values, keeper_of(values)
            values.register_post_accumulate_grad_hook(_weakly(self._values_accumulated))

    def _leaf_accumulated(self, leaf: torch.Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        self._arrived("core", gradient)

    def _values_accumulated(self, values: torch.Tensor) -> None:
        self.has_passed = True
        self._on_pass()
        self._arrived("values", values.grad)

    def _arrived(self, name: str, gradient: torch.Tensor | None) -> None:
        """Add a backward pass once both gradients are there, in whichever order; leave out one that fails halfway."""
        if backward_id() != self._backward:
            self._backward, self._parts, self._on_complete = backward_id(), {}, None
        self._parts[name] = gradient
        if len(self._parts) == 2:
            parts, self._parts = self._parts, {}
            self._add(parts["core"], parts["values"])
            on_complete, self._on_complete = self._on_complete, None
            if on_complete is not None:
                on_complete()

    def when_complete(self, call: Callable[[], None]) -> None:
        """Call a function now or, if an optimizer steps inside a backward pass, once that pass has been added."""
        if self._parts and backward_id() == self._backward:
            self._on_complete = call
        else:
            call()

    @torch.no_grad()
    def _add(self, gradient: torch.Tensor, values_gradient: torch.Tensor) -> None:
        if self.pending is not None and self._begins_anew(gradient, values_gradient):
            self.pending = None
        self._last = (weakref.ref(values_gradient), values_gradient._version)
        passed = self._score.of_pass(gradient)
        self.pending = passed if self.pending is None else self.pending.add_(passed)

    def _begins_anew(self, gradient: torch.Tensor, values_gradient: torch.Tensor) -> bool:
        """Return whether the values' gradient holds this pass alone, so that earlier passes were discarded."""
        last, version = self._last or (None, 0)
        if last is None or last() is not values_gradient:
            # A pass beside DeepSpeed's engine, which alone knows of earlier ones, is added to what there is.
            return not is_managed(self._values) if self._keeper is None else not self._keeper()  # pyright: ignore
        if values_gradient._version == version + 1:  # written to by this pass alone
            return False
        # Set to zero, or clipped or averaged between two micro-batches.
        return torch.equal(values_gradient, gradient.flatten()[self._indices()].to(values_gradient.dtype))

    @property
    def has_passed_without_keeper(self) -> bool:
        """True after a pass if no engine was found that keeps the gradient of earlier passes elsewhere."""
        return self.has_passed and self._keeper is None

    @torch.no_grad()
    def commit(self) -> bool:
        """Add what is pending to the total, because a step was taken with it; return whether there was anything."""
        pending, self.pending = self.pending, None
        if pending is None:
            return False
        self.total = pending.float() if self.total is None else self.total.to(pending.device).add_(pending)
        return True

    def discard(self) -> None:
        """Drop what is pending, because no step will be taken with it."""
        self.pending = None

    def mean_over_ranks(self, device: torch.device) -> torch.Tensor | None:
        """Return the mean of the totals of all ranks, (r_out, r_in), or None if it is zero; a collective operation.

        The mean is what one process has, whatever the number of ranks.
        """
        total = self.total
        if sum_over_ranks(torch.tensor(float(total is not None), device=device)) == 0:
            return None
        return mean_over_ranks(torch.zeros(self._shape, device=device) if total is None else total.to(device))

    def score(self, device: torch.device) -> torch.Tensor | None:
        """Return the score of each entry of the core by the totals of all ranks, see `mean_over_ranks`."""
        total = self.mean_over_ranks(device)
        return None if total is None else self._score.of_total(total)


def _weakly(method: Callable[[torch.Tensor], None]) -> Callable[[torch.Tensor], None]:
    """Return a function that calls a method for as long as its object lives.

    A tensor keeps its hooks where Python's garbage collector cannot see that they lead back to the tensor.
    """
    reference = weakref.WeakMethod(method)

    def call(tensor: torch.Tensor) -> None:
        bound = reference()
        if bound is not None:
            bound(tensor)

    return call
