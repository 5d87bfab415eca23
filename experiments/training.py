"""The Trainer's arguments, which every program fills in alike."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any, TypeVar

from transformers import TrainingArguments

from .loading import DEVICE

LR_WARMUP = 0.06  # share of the steps; the papers name none, and this is RoBERTa's for GLUE
ArgumentsT = TypeVar("ArgumentsT", bound=TrainingArguments)


def training_arguments(
    kind: type[ArgumentsT], folder: Path, *, lr: float, batch_size: int, epochs: float, seed: int, **further: Any
) -> ArgumentsT:
    """Return arguments of the class `kind`, for the device that there is and without trackers.

    Args:
        kind: `TrainingArguments` or a class made of it.
        folder: Where the Trainer may write.
        lr: Peak learning rate.
        batch_size: Rows in a training batch, on each device.
        epochs: Passes over the training rows.
        seed: Of the order of the rows, and of dropout.
        further: More of the class's arguments. They win over those that are set here.
    """
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "learning_rate": lr,
        "per_device_train_batch_size": batch_size,
        "num_train_epochs": epochs,
        "seed": seed,
        "use_cpu": DEVICE == "cpu",
        "dataloader_pin_memory": DEVICE == "cuda",
        "disable_tqdm": not sys.stderr.isatty(),
        "report_to": [],
    }
    return kind(**{**settings, **further})


def count_steps(rows: int, batch_size: int, epochs: int) -> int:
    """Return the number of optimisation steps."""
    return math.ceil(rows / batch_size) * epochs


def rising_steps(steps: int, share: float = LR_WARMUP) -> int:
    """Return how many of the steps the learning rate rises in, if it does so in that share of them."""
    return math.ceil(share * steps)
