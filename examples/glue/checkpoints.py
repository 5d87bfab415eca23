"""Leftovers of a killed run in its folder: the Trainer's checkpoints, the last of them perhaps half written."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

TRAINING_ONLY = (
    "optimizer.pt",
    "scheduler.pt",
    "rng_state*.pth",
    "scaler.pt",
    "training_args.bin",
    TRAINER_STATE_NAME,
)


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step}"


def last_checkpoint(folder: Path) -> tuple[Path, TrainerState] | None:
    """The last checkpoint that is whole, and its state; those that are not are deleted.

    The Trainer writes the state last, so a checkpoint with a state that can be read has everything in it.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        state = _read_state(path)
        if state is not None:
            return path, state
        shutil.rmtree(path)
    return None


def _read_state(checkpoint: Path) -> TrainerState | None:
    try:
        return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    except (FileNotFoundError, ValueError):
        return None


def keep_model(checkpoint: Path, folder: Path) -> None:
    """Copy the checkpoint's model, whole or not at all, to `folder`."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(checkpoint, unfinished, ignore=shutil.ignore_patterns(*TRAINING_ONLY))
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
