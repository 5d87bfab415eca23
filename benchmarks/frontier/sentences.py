"""CoLA and STS-B: a classifier or regressor on top of a sentence encoder."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer

from benchmarks.compare.head import settle_head
from benchmarks.compare.task import Row
from benchmarks.compare.tasks import TASKS

from .batches import batch_order
from .task import Batch, FrontierTask, on_device

SEARCH_ROWS = 1000  # of the training file; at most a fifth of it
EVAL_BATCH = 128
HEAD_STEPS, HEAD_BATCH = 30, 32
HEAD_SEED = 1_000  # added to the run's seed: the head is settled on other batches than those that train


class SentenceTask(FrontierTask):
    """Labelled sentences of `benchmarks.compare`, without dropout. The final score is on the dev file.

    The learning rate is searched on rows of the training file that nothing trains on. The task head is settled by a
    few steps of its own before a method is attached, the same head for every method of a seed, and then trains with
    every method at a learning rate of its own.
    """

    def __init__(self, name: str, score_name: str, model: Path, data: Path) -> None:
        self.task, self.score_name, self.folder = TASKS[name], score_name, model
        tokenizer = AutoTokenizer.from_pretrained(model)
        self._collate: Callable[[list[Row]], Any] = self.task.collator(tokenizer)
        rows = self.task.rows(data, "train", tokenizer)
        random.Random(0).shuffle(rows)
        held_out = min(SEARCH_ROWS, len(rows) // 5)
        self.search, self.train = self._eval_batches(rows[:held_out]), rows[held_out:]
        self.final = self._eval_batches(self.task.rows(data, "dev", tokenizer))
        self.base = self.task.load_model(str(model))

    def batches(self, batch_size: int, steps: int, seed: int) -> list[Batch]:
        order = batch_order([len(row["input_ids"]) for row in self.train], batch_size, steps, seed)
        return [self._batch([self.train[row] for row in rows]) for rows in order]

    def longest_batch(self, batch_size: int) -> Batch:
        by_length = sorted(self.train, key=lambda row: -len(row["input_ids"]))
        return self._batch(by_length[:batch_size])

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        return model(**batch).loss

    def settle(self, model: nn.Module, seed: int) -> None:
        batches = self.batches(HEAD_BATCH, HEAD_STEPS, seed + HEAD_SEED)
        settle_head(model, iter([[batch] for batch in batches]), lambda only: only[0])

    def scores(self, model: Any) -> dict[str, Any]:
        final, search = self._scores(model, self.final), self._scores(model, self.search)
        return {
            "score": final[self.score_name],
            "loss": final["loss"],
            "search_score": search[self.score_name],
            "search_loss": search["loss"],
        }

    def _scores(self, model: Any, batches: list[Batch]) -> dict[str, float]:
        device = next(model.parameters()).device
        outputs = [model(**on_device(batch, device)).logits.float().cpu().numpy() for batch in batches]
        labels = np.concatenate([batch["labels"].numpy() for batch in batches])
        return self.task.score(np.concatenate(outputs), labels)

    def _eval_batches(self, rows: list[Row]) -> list[Batch]:
        by_length = sorted(rows, key=lambda row: len(row["input_ids"]))
        return [self._batch(by_length[start : start + EVAL_BATCH]) for start in range(0, len(rows), EVAL_BATCH)]

    def _batch(self, rows: list[Row]) -> Batch:
        return dict(self._collate([dict(row) for row in rows]))


CoLA = partial(SentenceTask, "cola", "metric")
STSB = partial(SentenceTask, "stsb", "pearson")
