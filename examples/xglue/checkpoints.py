"""Checkpoints of a run: when they are written, and which one a killed run goes on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class SaveWithinEpochs(TrainerCallback):
    """Asks for a checkpoint every `steps` steps, but not at the end of an epoch.

    There the languages are scored first. A checkpoint before that would be one of a finished epoch without scores,
    and a run that goes on from it would not make them up.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        steps_per_epoch = state.max_steps // int(args.num_train_epochs)
        if state.global_step % self.steps == 0 and state.global_step % steps_per_epoch:
            control.should_save = True


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in the folder that is whole; None if there is none.

    The Trainer writes `trainer_state.json` last, so that a checkpoint without it was cut short.
    """
    complete = [state.parent for state in folder.glob("checkpoint-*/trainer_state.json") if _is_whole(state)]
    return max(complete, key=lambda checkpoint: int(checkpoint.name.rpartition("-")[2]), default=None)


def _is_whole(state: Path) -> bool:
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return False
    return True
