"""The passes that a warm-up takes of a Trainer's run, which may be too short for all that were asked for."""

from __future__ import annotations

import logging

from ...common.training.calling_trainer import calling_trainers

logger = logging.getLogger("peft_sparsegrad")

LEAST_PASSES = 2  # one pass for the basis, one for the support
_SHARE = 4  # a run's passes for each one of its warm-up


def budget_in_run(budget: int, way_to_more: str = "`peft_sparsegrad.warmup` or `SparseGradCallback`") -> int:
    """Return the number of passes that a warm-up in training takes, and log it if that is less than `budget`.

    It takes at most a quarter of the passes that are left in the run of the Trainer that is training. The length of a
    run without a Trainer is not known.

    Args:
        budget: Number of passes asked for.
        way_to_more: What takes them all, if it is run before training.
    """
    total = _passes_left()
    if total is None or (shortened := max(LEAST_PASSES, total // _SHARE)) >= budget:
        return budget
    outcome = "the adapter trains from then on" if shortened < total else "which leaves none to train the adapter"
    logger.warning(
        "SparseGrad's warm-up takes %d of this run's %d passes, and not the %d asked for: %s. For more, run "
        "%s before training.",
        *(min(shortened, total), total, budget, outcome, way_to_more),
    )
    return shortened


def announce_in_loop(budget: int) -> None:
    """Log at the first pass of a warm-up in a loop without a Trainer that `budget` passes train nothing."""
    if _passes_left() is None:
        logger.warning(
            "SparseGrad's warm-up takes the first %d backward passes, and the adapter trains after them: for a "
            "shorter loop %srun `peft_sparsegrad.warmup` before it.",
            *(budget, fewer_passes(budget)),
        )


def fewer_passes(budget: int) -> str:
    """Return the advice to ask for as few passes as there can be, for a sentence; nothing if `budget` is as few."""
    return f"set `warmup_steps={LEAST_PASSES}`, or " if budget > LEAST_PASSES else ""


def _passes_left() -> int | None:
    """Return the number of backward passes left in the run of the innermost Trainer that trains; None without one."""
    for trainer in calling_trainers():
        if trainer.is_in_train and trainer.state.max_steps > 0:
            steps = trainer.state.max_steps - trainer.state.global_step
            return steps * trainer.args.gradient_accumulation_steps
    return None
