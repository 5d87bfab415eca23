"""Schedules by which the rate of dropped gradients falls over the epochs (arXiv 2307.10098, section III.C)."""

from __future__ import annotations

from collections.abc import Callable


def constant(p: float, epoch: int, num_epochs: int) -> float:
    """Return `p` in every epoch."""
    return p


def linear(p: float, epoch: int, num_epochs: int) -> float:
    """Return `p (1 − e / (T − 1))`, which falls from `p` in the first epoch to 0 in the last."""
    return p * (1 - epoch / (num_epochs - 1))


def linear_paper(p: float, epoch: int, num_epochs: int) -> float:
    """Return `max(p − e / T, 0)`, the paper's step of 1/T read literally.

    From p = 0.9 it reaches 0 in the last epoch, as the paper says, only for T = 10. With fewer epochs it ends above 0
    (0.233 for T = 3), with more it is 0 before the last epoch.
    """
    return max(p - epoch / num_epochs, 0.0)


def exponential(p: float, epoch: int, num_epochs: int) -> float:
    """Return `p · 0.01^(e / (T − 1))`, which falls by one factor per epoch, to a hundredth of `p` in the last."""
    return p * 0.01 ** (epoch / (num_epochs - 1))


SCHEDULES: dict[str, Callable[[float, int, int], float]] = {
    "constant": constant,
    "linear": linear,
    "linear-paper": linear_paper,
    "exponential": exponential,
}
"""Schedules by name. Each is called with (p, epoch from 0, number of epochs) and returns the rate of that epoch."""
