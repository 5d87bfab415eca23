"""Checks of the tensors of an adapter file, of the file alone and against a model, before any of them is copied."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

import torch
from safetensors import SafetensorError, safe_open

from .checksum import check_checksum

ADVICE = "The adapter is damaged, or was trained on another model or with other settings."


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file, whose checksum is checked if it has one.

    Raises:
        ValueError: If the file is damaged. The message names it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no mapping
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is damaged or no safetensors file: {error}") from error
    check_checksum(path)
    return tensors, metadata


def check_method(names: Iterable[str], prefix: str, title: str) -> None:
    """Raise a ValueError if tensors are those of another method's adapter.

    Args:
        names: Names of the tensors of the file.
        prefix: Mark of the names of the method that they are for.
        title: Name of that method.
    """
    marked = [name for name in names if re.search(r"\.(sparsegrad|graddrop|lora)_", name)]
    if marked and not any(f".{prefix}" in name for name in marked):
        raise ValueError(
            f"the file is no {title} adapter but one of another method, its first tensor is {marked[0]!r}: load it "
            "into the base model with `PeftModel.from_pretrained`"
        )


def check_tensors(expected: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> None:
    """Raise a ValueError unless the given tensors are finite and have the names, shapes and kinds of dtype expected.

    Args:
        expected: The model's own tensors by name, or tensors like them on the meta device.
        given: Tensors of the file, under the same names.

    Raises:
        ValueError: If a tensor is missing, unknown, of another shape or kind of dtype, or holds NaN or Inf. The
            message names it.
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
        check_finite(key, tensor)


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise a ValueError if a tensor holds NaN or Inf."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    tensor = tensor.float() if tensor.itemsize == 1 else tensor  # float8 has no extremes
    if not torch.isfinite(torch.stack(tensor.aminmax())).all():
        raise ValueError(
            f"{name!r} holds NaN or Inf. The file is damaged, or the training that wrote it had diverged: load an "
            "earlier checkpoint."
        )
