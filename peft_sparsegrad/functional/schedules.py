"""How the rate at which gradients are dropped falls over the epochs (arXiv 2307.10098, section III.C)."""

from __future__ import annotations

from collections.abc import Callable


def constant(p: float, epoch: int, num_epochs: int) -> float:
    """`p`"""
    return p


def linear(p: float, epoch: int, num_epochs: int) -> float:
    """`p (1 − e / (T − 1))`: from `p` in the first epoch to 0 in the last, whatever their number."""
    return p * (1 - epoch / (num_epochs - 1))


def linear_paper(p: float, epoch: int, num_epochs: int) -> float:
    """`max(p − e / T, 0)`: the paper's step of 1/T, read literally.

    From p = 0.9 it ends at 0 in the last epoch, as the paper says it does, only for T = 10. With fewer epochs it ends
    above (0.233 for T = 3), with more it is 0 before the last.
    """
    return max(p - epoch / num_epochs, 0.0)


def exponential(p: float, epoch: int, num_epochs: int) -> float:
    """`p · 0.01^(e / (T − 1))`: falls by the same factor in every epoch, to a hundredth of `p` in the last."""
    return p * 0.01 ** (epoch / (num_epochs - 1))


SCHEDULES: dict[str, Callable[[float, int, int], float]] = {
    "constant": constant,
    "linear": linear,
    "linear-paper": linear_paper,
    "exponential": exponential,
}
"""Each is called with (p, epoch from 0, number of epochs) and returns the rate of that epoch."""
