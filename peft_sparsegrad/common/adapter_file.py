"""The check that the tensors of an adapter file fit a model, before any of them is copied."""

from __future__ import annotations

from collections.abc import Mapping

import torch

ADVICE = "The adapter is damaged, or was trained on another model or with other settings."


def check_tensors(expected: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> None:
    """Raise a ValueError unless names, shapes and kinds of dtype of the given tensors are those expected.

    Args:
        expected: The model's own tensors by name.
        given: Tensors of the file, under the same names.

    Raises:
        ValueError: If a tensor is missing, unknown, or of another shape or kind of dtype. The message names it.
    """
    if missing := sorted(expected.keys() - given.keys()):
        raise ValueError(f"{len(missing)} tensors of the adapter are missing, the first is {missing[0]!r}. {ADVICE}")
    if unknown := sorted(given.keys() - expected.keys()):
        raise ValueError(f"the model has no place for {len(unknown)} tensors, the first is {unknown[0]!r}. {ADVICE}")
    for key, own in expected.items():
        tensor = given[key]
        if tensor.shape != own.shape:
            raise ValueError(f"{key!r} has shape {tuple(tensor.shape)}, not {tuple(own.shape)}. {ADVICE}")
        if tensor.dtype != own.dtype and not (tensor.is_floating_point() and own.is_floating_point()):
            raise ValueError(f"{key!r} has dtype {tensor.dtype}, not {own.dtype}. {ADVICE}")
