"""The table of tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .chat import ChatTask
from .sentences import STSB, CoLA
from .task import FrontierTask

TASKS: dict[str, Callable[[Path, Path], FrontierTask]] = {"cola": CoLA, "stsb": STSB, "smollm2": ChatTask}
METRICS = {  # what the score is, and whether a higher one is better
    "cola": ("Matthews correlation", True),
    "stsb": ("Pearson correlation", True),
    "smollm2": ("loss on answers, nats", False),
}
DEFAULTS = {"cola": (32, 250), "stsb": (32, 250), "smollm2": (8, 150)}  # rows in a batch, backward passes


def load_task(name: str, model: Path, data: Path) -> FrontierTask:
    """Return the task with its model and data read."""
    return TASKS[name](model, data)
