"""A task's rows, from local files or the hub, as tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

from peft_sparsegrad.cli.errors import InputError

from .files import find_file, read_columns
from .tasks import Task

HUB_DATASET = "nyu-mll/glue"


class Splits(NamedTuple):
    """Rows to train on and to score."""

    train: Dataset
    dev: Dataset


def load_task(task: Task, data: Path | None) -> Splits:
    """Both splits, with the task's columns of sentences and "label".

    Args:
        data: The folder above the task's; None for the hub.

    Raises:
        InputError: If a split cannot be had, or a row is not in the task's format.
    """
    if data is None:
        return Splits(_from_hub(task, "train"), _from_hub(task, task.dev_split))
    return Splits(*(Dataset.from_dict(read_columns(find_file(data, task, split), task)) for split in ("train", "dev")))


def _from_hub(task: Task, split: str) -> Dataset:
    try:
        dataset: Any = load_dataset(HUB_DATASET, task.name, split=split)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        message = f"{task.name} of {HUB_DATASET} cannot be had from the hub ({reason}); --data reads local files"
        raise InputError(message) from error
    return dataset.select_columns([*task.columns, "label"])


def take_rows(rows: Dataset, count: int | None, seed: int, option: str = "--train-rows") -> Dataset:
    """`count` rows drawn at random; all of them, in their order, where it is None.

    Raises:
        InputError: If there are not so many. The message names the `option` that asks for them.
    """
    if count is None:
        return rows
    if count > len(rows):
        raise InputError(f"{option} asks for {count:,} rows, and there are {len(rows):,}")
    return rows.shuffle(seed=seed).select(range(count))


def tokenize(rows: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """The rows as the model takes them, without padding."""

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        first, second = (*(batch[name] for name in task.columns), None)[:2]
        encoded = tokenizer(first, second, truncation=True, max_length=max_length)
        return {**encoded, "labels": batch["label"]}

    return rows.map(encode, batched=True, remove_columns=rows.column_names)
