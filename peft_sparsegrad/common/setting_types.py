"""The check that a configuration's settings have the types that they should, which a damaged file may not hold."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import torch


def _is_text(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike))


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _are(each: Callable[[Any], bool], value: Any) -> bool:
    """Return whether a list, set or the like has only entries for which `each` is true."""
    return isinstance(value, Collection) and not isinstance(value, (str, Mapping)) and all(map(each, value))


def _are_names(value: Any) -> bool:
    return _are(lambda name: isinstance(name, str), value)


def _are_tokens(value: Any) -> bool:
    if isinstance(value, Mapping):
        return _are_names(list(value)) and all(map(_are_tokens, value.values()))
    return _are(_is_number, value)


_NAMES = "a name, a list of names or None", lambda value: value is None or isinstance(value, str) or _are_names(value)
_TEXT = "a text or None", lambda value: value is None or _is_text(value)
_FLAG = "True or False", _is_flag
_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "auto_mapping": ("a dictionary or None", lambda value: value is None or isinstance(value, Mapping)),
    "base_model_name_or_path": _TEXT,
    "exclude_modules": _NAMES,
    "format_version": ("a whole number", _is_number),
    "inference_mode": _FLAG,
    "init_weights": _FLAG,
    "layers_pattern": _NAMES,
    "layers_to_transform": (
        "a whole number, a list of them or None",
        lambda value: value is None or _is_number(value) or _are(_is_number, value),
    ),
    "modules_to_save": ("a list of names or None", lambda value: value is None or _are_names(value)),
    "revision": _TEXT,
    "target_modules": _NAMES,
    "target_parameters": ("a list of names or None", lambda value: value is None or _are_names(value)),
    "trainable_token_indices": (
        "a list of token numbers, a dictionary of such lists or None",
        lambda value: value is None or _are_tokens(value),
    ),
}


def plain(value: Any) -> Any:
    """Return a setting in Python's own types, which JSON can hold: those of NumPy, ranges and paths are converted."""
    if value is None or isinstance(value, (bool, str, bytes)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(each) for key, each in value.items()}
    if isinstance(value, Collection) and not isinstance(value, torch.Tensor):
        kind = tuple if isinstance(value, tuple) else set if isinstance(value, (set, frozenset)) else list
        return kind(map(plain, value))
    return value


def check_types(config: Any) -> None:
    """Raise a ValueError for the first of the settings that both methods have whose value is of another type."""
    for name, (wanted, is_right) in _TYPES.items():
        value = getattr(config, name)
        if not is_right(value):
            raise ValueError(f"`{name}` must be {wanted}, not {value!r}")
    for name in ("target_modules", "exclude_modules"):
        if isinstance(value := getattr(config, name), str):
            check_expressions(name, [value])
    patterns = config.layers_pattern
    check_expressions("layers_pattern", [patterns] if isinstance(patterns, str) else patterns or ())


def check_expressions(name: str, expressions: Iterable[str]) -> None:
    """Raise a ValueError for the first of a field's regular expressions that is none."""
    for expression in expressions:
        try:
            re.compile(expression)
        except (re.error, TypeError) as error:
            raise ValueError(f"`{name}` must be a regular expression, and {expression!r} is none: {error}") from error
