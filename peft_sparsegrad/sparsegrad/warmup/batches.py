"""What a user gives an explicit warm-up in place of batches, and which batches have no labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

import torch

from .budget import LEAST_PASSES

_WANTED = (
    "pass batches for `model(**batch).loss`, dictionaries of tensors with `labels` such as a DataLoader gives, or, "
    "for any other loss, a callable that runs one forward and one backward pass"
)
_TENSORS = ("input_ids", "attention_mask", "inputs_embeds", "labels")  # which every model takes as tensors


def check_steps(steps: Any) -> None:
    """Raise an error unless `steps` is None or a number of passes that a warm-up can do with."""
    if steps is None:
        return
    if not isinstance(steps, Integral) or isinstance(steps, bool):
        raise TypeError(f"`steps` must be a whole number or None, not {steps!r}")
    if steps < LEAST_PASSES:
        raise ValueError(f"`steps` must be at least 2 (one pass for the basis, one for the support), not {steps}")


def problem_of_batches(batches: Any) -> str | None:
    """Return a sentence that says why these are not batches, or None if they may be."""
    if isinstance(batches, Mapping):
        return "`batches` is one batch: put it into a list, `[batch]`, with as many others as the warm-up has passes"
    if isinstance(batches, torch.Tensor | str) or not isinstance(batches, Iterable):
        return f"`batches` must be several batches, not a {type(batches).__name__}: {_WANTED}"
    return None


def problem_of_batch(batch: Any, index: int) -> str | None:
    """Return a sentence that says why the batch `index` cannot be given to a model, or None if it can."""
    if not isinstance(batch, Mapping):
        return f"warm-up batch {index} is a {type(batch).__name__} and no dictionary: {_WANTED}"
    for name in _TENSORS:
        if isinstance(batch.get(name), list):
            return (
                f"`{name}` of warm-up batch {index} is a list and no tensor: use a DataLoader with a data collator, "
                f'or `tokenizer(..., return_tensors="pt")`'
            )
    return None


def has_labels(batch: Any) -> bool:
    """Return whether a batch has labels other than -100, which losses leave out, or no field `labels` at all."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return not isinstance(labels, torch.Tensor) or labels.is_floating_point() or bool((labels != -100).any())
