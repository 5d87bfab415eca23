"""The share of the gradient's energy that the core and the support hold during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from .style import look, panels, styled, tidy

_KEYS = {"sparsegrad_energy_in_core": "in the core", "sparsegrad_energy_in_support": "on the support"}


@styled
def energy_over_training(log_history: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the share of ‖G‖² in the core and on the support at each logging step, and the training loss.

    Args:
        log_history: `trainer.state.log_history` of a run with `SparseGradCallback`, or `log_history` in its
            `trainer_state.json`.

    Raises:
        ValueError: If no energy was logged.
    """
    entries = [entry for entry in log_history if _KEYS.keys() <= entry.keys() and "step" in entry]
    if not entries:
        raise ValueError("the log has no energy captured: train with SparseGradCallback(log_energy=True)")
    figure, axes = panels(2, 1, 5.6, 2.6)
    steps, marker = [entry["step"] for entry in entries], "o" if len(entries) < 40 else ""
    for number, (key, name) in enumerate(_KEYS.items()):
        axes[0, 0].plot(steps, [100 * entry[key] for entry in entries], marker=marker, label=name, **look(number))
    axes[0, 0].set(ylabel="share of ‖G‖² of the step, %", ylim=(0, 102), title="Gradient energy captured")
    axes[0, 0].legend(frameon=False)
    losses = [(entry["step"], entry["loss"]) for entry in log_history if "loss" in entry and "step" in entry]
    axes[1, 0].plot(*zip(*losses, strict=True), marker=marker, **look(2))
    axes[1, 0].set(ylabel="training loss")
    for axis in axes[:, 0]:
        axis.set(xlabel="optimizer step")
        axis.set_xlim(0, max(step for step, _ in losses) * 1.02)
        tidy(axis)
    return figure
