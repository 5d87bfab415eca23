"""Language modelling: a row is a block of tokens of prompts and their answers, packed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, default_data_collator

from experiments.json_files import read_records
from peft_sparsegrad.cli.errors import InputError

from .task import Row, Split, Task

BLOCK = 128  # tokens
DEV_EVERY = 5


@dataclass(frozen=True)
class LanguageTask(Task):
    """One JSON Lines file of instructions with instances of input and output; every 5th instruction is scored."""

    higher_is_better: ClassVar[bool] = False
    has_head: ClassVar[bool] = False
    unit: ClassVar[str] = f"blocks of {BLOCK} tokens"

    def check_model(self, folder: str) -> None:
        kinds = AutoConfig.from_pretrained(folder).architectures or []
        if not any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds):
            raise InputError(f"{self.name} needs a causal language model, and {folder} is {kinds}")

    def load_model(self, folder: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, attention_dropout=0.0, dtype="float32")

    def rows(self, data: Path, split: Split, tokenizer: Any) -> list[Row]:
        texts = [text for document in self.load(data, split) for text in document]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        tokens = list(chain.from_iterable([*text, *end] for text in encoded))
        blocks = (tokens[start : start + BLOCK] for start in range(0, len(tokens) - BLOCK + 1, BLOCK))
        rows = [{"input_ids": block, "labels": block} for block in blocks]
        if not rows:
            raise InputError(f"{data / self.file} has {len(tokens)} {split} tokens, too few for a block of {BLOCK}")
        return rows

    def collator(self, tokenizer: Any) -> Callable[[list[Row]], dict[str, torch.Tensor]]:
        return default_data_collator

    @staticmethod
    def reduce(predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross entropy of each token but the first: logits (rows, length, vocabulary), labels (rows, length)."""
        return cross_entropy(predictions[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none")

    def load(self, data: Path, split: Split) -> list[list[str]]:
        """For each instruction of the split, the texts of its instances: prompt, input, answer.

        Raises:
            InputError: If the file under `data` cannot be read, or a line of it.
        """
        return [
            texts
            for number, texts in enumerate(self._documents(data / self.file))
            if (number % DEV_EVERY == DEV_EVERY - 1) == (split == "dev")
        ]

    def _documents(self, path: Path) -> Iterator[list[str]]:
        try:
            records = read_records(path)
        except InputError as error:
            raise InputError(f"{error}; --data is the folder above it") from error
        for number, (_where, record) in enumerate(records, start=1):
            try:
                yield _texts(record)
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path}, row {number} is not in the format of {self.name}: {error!r}") from error


def _texts(record: dict[str, Any]) -> list[str]:
    return [
        "\n\n".join(part for part in (record["instruction"], instance["input"], instance["output"]) if part)
        for instance in record["instances"]
    ]
