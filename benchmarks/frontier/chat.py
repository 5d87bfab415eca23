"""Conversations for a small chat model: the loss on answers, and what is forgotten meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from examples.llama2_chat.chat_template import IGNORED, encode_all, load_tokenizer

from .batches import batch_order
from .conversations import other_blocks, split_by_tree
from .questions import answers, count_right, question_tokens
from .task import Batch, FrontierTask, on_device

MAX_LENGTH = 512  # tokens
EVAL_BATCH = 8
Row = dict[str, list[int]]


class ChatTask(FrontierTask):
    """SmolLM2 on OpenAssistant; the score is the loss on the answers of conversations from other trees.

    Forgetting is measured on text of another kind, and by ten questions.
    """

    def __init__(self, model: Path, data: Path) -> None:
        self.tokenizer = load_tokenizer(model)
        split = split_by_tree(data)
        self.train = encode_all(self.tokenizer, split.train, MAX_LENGTH)
        self.search = _eval_batches(encode_all(self.tokenizer, split.search, MAX_LENGTH))
        self.final = _eval_batches(encode_all(self.tokenizer, split.final, MAX_LENGTH))
        blocks = other_blocks(data, self.tokenizer)
        self.other = _eval_batches([{"input_ids": block, "labels": block} for block in blocks])
        self.questions = question_tokens(self.tokenizer)
        self.base: Any = AutoModelForCausalLM.from_pretrained(model, dtype="float32", attention_dropout=0.0)

    def batches(self, batch_size: int, steps: int, seed: int) -> list[Batch]:
        order = batch_order([len(row["input_ids"]) for row in self.train], batch_size, steps, seed)
        return [collate([self.train[row] for row in rows]) for rows in order]

    def longest_batch(self, batch_size: int) -> Batch:
        return collate(sorted(self.train, key=lambda row: -len(row["input_ids"]))[:batch_size])

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        return label_loss(model, batch)

    def scores(self, model: Any) -> dict[str, Any]:
        search, final, other = (self._mean_loss(model, each) for each in (self.search, self.final, self.other))
        texts = answers(model, self.tokenizer, *self.questions)
        return {
            "score": final,
            "loss": final,
            "search_score": -search,
            "search_loss": search,
            "other_loss": other,
            "questions_right": count_right(texts),
            "answers": texts,
        }

    def _mean_loss(self, model: Any, batches: list[Batch]) -> float:
        """Return the mean over all labelled tokens, in nats."""
        device = next(model.parameters()).device
        counts = [len(batch["targets"]) for batch in batches]
        losses = [label_loss(model, on_device(batch, device)) for batch in batches]
        total = sum(loss.item() * count for loss, count in zip(losses, counts, strict=True))
        return total / sum(counts)


def collate(rows: list[Row]) -> Batch:
    """Return rows padded on the right, with the places of the tokens to be predicted.

    Returns:
        `input_ids` (rows, length); `places` (n,), the positions, in the flattened batch, from which a labelled token
        is predicted; `targets` (n,), those tokens. Padding comes after every real token, so that a causal model
        needs no mask for it.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    tokens = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])
    labels = torch.tensor([row["labels"][1:] + [IGNORED] * (longest - len(row["labels"]) + 1) for row in rows])
    places = (labels.flatten() != IGNORED).nonzero().squeeze(1)
    return {"input_ids": tokens, "places": places, "targets": labels.flatten()[places]}


def label_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Return the mean cross entropy, in nats, of the batch's targets; no other logits are computed."""
    language_model: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    hidden = language_model.get_decoder()(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
    logits = language_model.get_output_embeddings()(hidden.flatten(0, 1)[batch["places"]])
    return cross_entropy(logits.float(), batch["targets"])


def _eval_batches(rows: list[Row]) -> list[Batch]:
    by_length = sorted(rows, key=lambda row: len(row["input_ids"]))
    return [collate(by_length[start : start + EVAL_BATCH]) for start in range(0, len(rows), EVAL_BATCH)]
