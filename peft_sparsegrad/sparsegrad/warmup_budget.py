"""The passes that a warm-up takes of a Trainer's run, which may be too short for all that were asked for."""

from __future__ import annotations

import logging

from ..common.calling_trainer import calling_trainers

logger = logging.getLogger("peft_sparsegrad")

LEAST_PASSES = 2  # one pass for the basis, one for the support
_SHARE = 4  # a run's passes for each one of its warm-up


def budget_in_run(budget: int) -> int:
    """Return the number of passes that a warm-up in training takes, and log it if that is less than `budget`.

    It takes at most a quarter of the passes that are left in the run of the Trainer that is training. The length of a
    run without a Trainer is not known.

    Args:
        budget: Number of passes asked for.
    """
    total = _passes_left()
    if total is None or (shortened := max(LEAST_PASSES, total // _SHARE)) >= budget:
        return budget
    outcome = "the adapter trains from then on" if shortened < total else "which leaves none to train the adapter"
    logger.warning(
        "SparseGrad's warm-up takes %d of this run's %d passes, and not the %d asked for: %s. For more, run "
        "`peft_sparsegrad.warmup` or `SparseGradCallback` before training.",
        *(min(shortened, total), total, budget, outcome),
    )
    return shortened


def _passes_left() -> int | None:
    """Return the number of backward passes left in the run of the innermost Trainer that trains; None without one."""
    for trainer in calling_trainers():
        if trainer.is_in_train and trainer.state.max_steps > 0:
            steps = trainer.state.max_steps - trainer.state.global_step
            return steps * trainer.args.gradient_accumulation_steps
    return None
