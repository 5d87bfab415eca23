"""What a warm-up cannot use: gradients with NaN or Inf, passes without a gradient, layers that no gradient came to."""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger("peft_sparsegrad")


def is_no_overflow(name: str, dy: torch.Tensor, in_training: bool) -> bool:
    """Leave out a gradient with NaN or Inf, as loops skip its step; return False if a gradient scaler does that.

    Args:
        name: Name of the module.
        dy: The gradient of its output.
        in_training: False in an explicit warm-up.

    Raises:
        ValueError: In an explicit warm-up, whose batches are all there is.
    """
    if dy.dtype == torch.float16:  # the loss scale is still being adjusted
        logger.warning("SparseGrad's warm-up leaves out a float16 gradient of %r that overflowed.", name)
        return False
    if not in_training:
        raise ValueError(
            f"SparseGrad's warm-up met NaN or Inf in the gradient of module {name!r}: check the batch and its "
            "labels, or lower the learning rate of what trains during the warm-up."
        )
    logger.warning("SparseGrad's warm-up leaves out a gradient of %r with NaN or Inf: check the batches.", name)
    return True


def check_any_gradient(count: int, passed_over: int) -> None:
    """Raise a ValueError if `count`, the number of passes with a gradient, is 0."""
    if not count:
        found = f"the gradient of {passed_over} batches was zero" if passed_over else "it saw no gradient"
        raise ValueError(
            f"SparseGrad's warm-up has nothing to go by, {found}: the batches must run a forward and a backward "
            "pass through the adapted layers, with gradients enabled and the adapter active."
        )


def warn_of_missing_bases(names: list[str]) -> None:
    """Warn that the passes for the bases brought no gradient to any layer of a group."""
    logger.warning(
        "SparseGrad's warm-up saw no gradient of %s in its passes for the bases, so theirs is data-free: if they are "
        "part of the loss, give it more passes.",
        names,
    )


def warn_of_missing_supports(names: list[str]) -> None:
    """Warn that the passes for the supports brought no gradient to some layers."""
    logger.warning(
        "SparseGrad's warm-up saw no gradient of %s, so their supports are data-free: if they are no part of the "
        "loss, name them in `exclude_modules`.",
        names,
    )
