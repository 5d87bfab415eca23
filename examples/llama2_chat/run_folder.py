"""The folder of a training run: what it was started with, its checkpoints, and whether it is finished."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from experiments.json_files import read_json
from peft_sparsegrad.cli.errors import InputError
from peft_sparsegrad.common.files.atomic import write_text

from .settings import check_same

RUN_FILE, METRICS_FILE = "run.json", "metrics.json"
COMPLETE = "complete"  # a file in a checkpoint that every process has finished writing: the seconds up to it


def read_run(folder: Path, settings: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The settings of the run that an earlier process began in `folder`.

    Returns:
        None where no run has begun, or the one that has is to be overwritten.

    Raises:
        InputError: That run had other settings, or the folder holds something else.
    """
    run = read_json(folder / RUN_FILE)
    if run is None and folder.exists() and _holds_something_else(folder):
        raise InputError(f"{folder} exists and holds no run of this program: give another --out")
    if run is None or overwrite:
        return None
    check_same(run, settings, folder)
    return run


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    complete = [marker.parent for marker in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE}")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def seconds_before(checkpoint: Path | None) -> float:
    """Return how long the run had trained when the checkpoint was written, all its parts together; 0 without one."""
    return 0.0 if checkpoint is None else float((checkpoint / COMPLETE).read_text("utf-8") or 0)


class MarkCompleteCheckpoints(TrainerCallback):
    """Marks a checkpoint once all its files are there, those of every process, with the seconds up to it.

    Args:
        before: Seconds of the parts of the run that ended before this process began.
    """

    def __init__(self, before: float) -> None:
        self._before, self._start = before, time.perf_counter()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        processes: Any = args.distributed_state
        processes.wait_for_everyone()
        if state.is_world_process_zero:
            seconds = self._before + time.perf_counter() - self._start
            marker = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / COMPLETE
            write_text(marker, f"{seconds:.3f}\n")


def _holds_something_else(folder: Path) -> bool:
    # A process killed before its first record leaves at most an unfinished one.
    return not folder.is_dir() or any(path.name != f"{RUN_FILE}.unfinished" for path in folder.iterdir())
