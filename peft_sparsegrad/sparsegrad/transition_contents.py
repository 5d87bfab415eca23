"""The checks of a file of transition matrices, before a model is changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from ..common.files.adapter_file import check_tensors
from ..common.targets.modules import role_of
from ..functional import unpack_support
from .stored_layer import basis_like, check_orthonormal

Descriptions = dict[str, dict[str, Any]]


def read_contents(text: str | None) -> tuple[Descriptions, Descriptions]:
    """Return the descriptions of groups and supports in a file's metadata.

    Raises:
        ValueError: If they are no JSON, or not of the form that `save_transition_matrices` writes.
    """
    try:
        contents = json.loads(text or "")
    except ValueError as error:
        raise ValueError(f"its metadata `contents` is no JSON: {error}") from error
    if not isinstance(contents, dict) or contents.keys() != {"groups", "supports"}:
        raise ValueError("its metadata `contents` should be a dictionary of `groups` and `supports`")
    for kind, is_right in (("groups", _is_group), ("supports", _is_support)):
        if not isinstance(contents[kind], dict):
            raise ValueError(f"`{kind}` in its metadata should be a dictionary, not {contents[kind]!r}")
        for name, entry in contents[kind].items():
            if not isinstance(entry, dict) or not is_right(entry):
                raise ValueError(f"{name!r} in `{kind}` of its metadata is {entry!r}, which describes none")
    return contents["groups"], contents["supports"]


def check_contents(groups: Descriptions, supports: Descriptions, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise a ValueError unless the tensors are those described, and are bases and supports."""
    expected: dict[str, torch.Tensor] = {}
    for name, group in groups.items():
        expected |= basis_like(f"{name}.", group["weight_shape"], group["ranks"])
    missing = sorted({*expected, *(f"support.{name}" for name in supports)} - tensors.keys())
    if missing:
        raise ValueError(f"the tensor {missing[0]!r} is missing")
    check_tensors(expected, {key: tensor for key, tensor in tensors.items() if not key.startswith("support.")})
    for name in expected:
        check_orthonormal(name, tensors[name])
    for key, packed in tensors.items():
        if key.startswith("support."):
            _check_support(key, packed, groups, supports)


def _check_support(key: str, packed: torch.Tensor, groups: Descriptions, supports: Descriptions) -> None:
    module = key.removeprefix("support.")
    if module not in supports:
        raise ValueError(f"the tensor {key!r} is not in its metadata")
    support, error = supports[module], f"no group of its metadata has the ranks {supports[module]['ranks']}"
    for group in groups.values():
        if group["role"] == role_of(module) and group["ranks"] == support["ranks"]:
            (out_features, in_features), (r_out, r_in) = group["weight_shape"], group["ranks"]
            try:
                entries = (r_out or out_features) * (r_in or in_features)
                unpack_support(packed, support.get("experts", 1) * entries, support["k"])
                return
            except ValueError as reason:
                error = str(reason)
    raise ValueError(f"{key!r}: {error}")


def _is_group(entry: dict[str, Any]) -> bool:
    return (
        entry.keys() == {"role", "weight_shape", "ranks"}
        and isinstance(entry["role"], str)
        and _is_pair(entry["weight_shape"])
        and _is_pair(entry["ranks"], None)
        and entry["ranks"] != [None, None]
    )


def _is_support(entry: dict[str, Any]) -> bool:
    counts = _is_count(entry.get("k")) and _is_count(entry.get("experts", 1))
    return entry.keys() - {"experts"} == {"k", "ranks"} and counts and _is_pair(entry["ranks"], None)


def _is_pair(value: Any, *others: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_count(each) or each in others for each in value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
