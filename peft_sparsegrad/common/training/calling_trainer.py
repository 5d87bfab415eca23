"""The Trainer that is calling: find it, log before its trackers, keep the adapter's sections of its model card."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..files.atomic import write_text
from ..files.model_card import with_sections_of


def trainer_of(callback: TrainerCallback) -> Trainer:
    """Return the Trainer that is calling one of the callback's methods, which transformers does not pass to it.

    Raises:
        RuntimeError: If no Trainer with this callback is calling.
    """
    for trainer in calling_trainers():
        if callback in trainer.callback_handler.callbacks:
            return trainer
    raise RuntimeError(
        f"{type(callback).__name__} must be called by a Trainer that it was given to: in a loop of your own, call "
        "`peft_sparsegrad.warmup(model, batches)` for SparseGrad, or use `peft_sparsegrad.GradDrop`"
    )


def calling_trainers() -> Iterator[Trainer]:
    """Yield the Trainers whose methods are being called now, the innermost first."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            yield caller
        frame = frame.f_back


class LoggedFigures(TrainerCallback):
    """Callback that adds figures to the log of each logging step of training, before a tracker reads it.

    A callback that a user gives to a Trainer has its turn after the trackers, too late for that.

    Args:
        measure: Returns the figures by their names in the log; there may be none.
    """

    def __init__(self, measure: Callable[[], dict[str, float]]) -> None:
        self.measure = measure

    def put_first(self, trainer: Trainer) -> None:
        """Put this callback before all others of a Trainer, for the events from the next one on."""
        handler = trainer.callback_handler
        # A new list, because the Trainer may be going through the old one.
        handler.callbacks = [self, *(each for each in handler.callbacks if each is not self)]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and "loss" in logs:
            figures = self.measure()
            logs.update(figures)
            state.log_history[-1].update(figures)


def keep_card(trainer: Trainer) -> None:
    """Let a Trainer's `create_model_card`, which writes the card anew, keep this package's sections of it."""
    create = trainer.create_model_card
    if hasattr(create, "keeps_sections"):
        return

    @wraps(create)
    def create_and_keep(*args: Any, **kwargs: Any) -> None:
        card = Path(str(trainer.args.output_dir), "README.md")
        earlier = card.read_text("utf-8") if card.exists() else ""
        create(*args, **kwargs)
        if trainer.is_world_process_zero():
            write_text(card, with_sections_of(earlier, card.read_text("utf-8")))

    create_and_keep.keeps_sections = True  # pyright: ignore[reportAttributeAccessIssue]
    trainer.create_model_card = create_and_keep
