"""The base model of an adapter: which class it has, its weights, and the layout of its weights without them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from ..common.files.model_card import TASK_CLASSES
from .errors import InputError
from .saved.adapter import SavedAdapter
from .saved.method import WeightLayout

# Ends of the names of weights with a row for each label.
_HEADS = (".classifier.weight", ".score.weight", ".classifier.out_proj.weight")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json")


def base_model_class(adapter: SavedAdapter) -> Any:
    """The class that loads the adapter's base model: of its task, or the one that the adapter was made of.

    Raises:
        InputError: If the adapter names neither.
    """
    task, made_of = adapter.config.get("task_type"), adapter.config.get("auto_mapping") or {}
    if task in TASK_CLASSES:
        return getattr(transformers, TASK_CLASSES[task])
    try:
        return getattr(importlib.import_module(made_of["parent_library"]), made_of["base_model_class"])
    except (KeyError, ImportError, AttributeError) as error:
        raise InputError(
            f"{adapter.folder} does not say what kind of model its base is: set `task_type` in its "
            f"adapter_config.json to one of {', '.join(TASK_CLASSES)}"
        ) from error


def load_base(adapter: SavedAdapter, base: str | None) -> Any:
    """The base model, in the dtype of its checkpoint.

    Args:
        adapter: The adapter.
        base: Folder or hub id; None for the one that the adapter names.
    """
    return load_pretrained(base_model_class(adapter), _path(adapter, base), dtype="auto", **_head_settings(adapter))


def weight_layouts(adapter: SavedAdapter, base: str | None) -> dict[str, WeightLayout]:
    """Return the layout of the base model's linear layers by module, from its configuration alone."""
    layouts = {}
    for name, module in _without_weights(adapter, base).named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 2:
            transposed = isinstance(module, Conv1D)
            rows, columns = weight.shape[::-1] if transposed else weight.shape
            layouts[name] = WeightLayout((rows, columns), transposed)
    return layouts


def module_names(adapter: SavedAdapter, base: str | None) -> list[str]:
    """The modules of the base model in its order, from its configuration alone."""
    return [name for name, _ in _without_weights(adapter, base).named_modules()]


def _without_weights(adapter: SavedAdapter, base: str | None) -> nn.Module:
    kind = base_model_class(adapter)
    config = load_pretrained(AutoConfig, _path(adapter, base), **_head_settings(adapter))
    with torch.device("meta"):
        return kind.from_config(config) if hasattr(kind, "from_config") else kind(config)


def load_adapted(adapter: SavedAdapter, base: str | None) -> PeftModel:
    """The base model with the adapter on it, under the name `default`."""
    model = load_base(adapter, base)
    try:
        return PeftModel.from_pretrained(model, str(adapter.folder))
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"the adapter in {adapter.folder} does not go onto its base model: {reason}") from error


def load_tokenizer(adapter: SavedAdapter, base: str | None) -> Any | None:
    """The tokenizer that was saved with the adapter, else that of the base model; None if neither folder has one."""
    places = [str(adapter.folder), _path(adapter, base)]
    for place in places:
        folder = Path(place)
        if not folder.is_dir() or any((folder / name).exists() for name in _TOKENIZER_FILES):
            return load_pretrained(AutoTokenizer, place)
    return None


def load_pretrained(auto_class: Any, path: str | Path, **settings: Any) -> Any:
    """`auto_class.from_pretrained`, for a path that may be wrong."""
    try:
        return auto_class.from_pretrained(path, **settings)
    except (ImportError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        where = f"from the folder {path}" if Path(path).is_dir() else f"{path}, which is no folder here, from the hub"
        raise InputError(f"{auto_class.__name__} cannot load {where}: {reason}") from error


def _path(adapter: SavedAdapter, base: str | None) -> str:
    path = base or adapter.config.get("base_model_name_or_path")
    if not path:
        raise InputError(f"{adapter.folder} does not name its base model: give --base")
    return path


def _head_settings(adapter: SavedAdapter) -> dict[str, int]:
    """The number of labels, where the adapter carries the task head."""
    if adapter.config.get("task_type") not in ("SEQ_CLS", "TOKEN_CLS"):
        return {}
    heads = [info.shape[0] for name, info in adapter.tensors.items() if f".{name}".endswith(_HEADS)]
    return {"num_labels": heads[-1]} if heads else {}
