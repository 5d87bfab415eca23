"""A saved adapter of any PEFT method: its settings, and its tensors by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ...common.files.checksum import check_checksum
from ..errors import InputError

_PEFT_PREFIX = "base_model.model."
_ITEMSIZE = {
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
}


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor, as the header of a safetensors file gives them."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * _ITEMSIZE.get(self.dtype, 1)


class SavedAdapter:
    """The folder that `save_pretrained` wrote. Tensors are read when they are asked for, one at a time.

    Args:
        path: The folder, or one of its two files.

    Attributes:
        folder: The folder.
        config: `adapter_config.json` as it is.

    Raises:
        InputError: If there is no adapter, or one of its files is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.folder = path.parent if path.name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME) else path
        if not self.folder.is_dir():
            what = "is a file" if self.folder.exists() else "is not there"
            raise InputError(f"{self.folder} {what}: name the folder of an adapter, with {CONFIG_NAME} in it")
        self.config = self._read_config()
        self._file = self._open_weights()

    @property
    def method(self) -> str:
        """The PEFT type in capitals, `SPARSEGRAD` for instance."""
        return str(self.config["peft_type"])

    @property
    def weights_path(self) -> Path:
        return self.folder / SAFETENSORS_WEIGHTS_NAME

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor in the file, by its name without PEFT's prefix, in natural order."""
        infos = {}
        for key in self._file.keys():  # noqa: SIM118  no mapping
            entry = self._file.get_slice(key)
            infos[key.removeprefix(_PEFT_PREFIX)] = TensorInfo(tuple(entry.get_shape()), str(entry.get_dtype()))
        return {name: infos[name] for name in sorted(infos, key=natural_order)}

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor. Its name is one of `tensors`."""
        key = name if name in self._keys else _PEFT_PREFIX + name
        try:
            return self._file.get_tensor(key)
        except SafetensorError as error:
            raise InputError(f"{self.weights_path} is damaged at {key!r}: {error}") from error

    @cached_property
    def _keys(self) -> set[str]:
        return set(self._file.keys())

    def _read_config(self) -> dict[str, Any]:
        path = self.folder / CONFIG_NAME
        if not path.exists():
            raise InputError(f"{self.folder} holds no adapter: {CONFIG_NAME} is missing{self._what_it_is()}")
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is damaged: {error}") from error
        if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
            raise InputError(f"{path} is not a PEFT configuration: it has no `peft_type`")
        return config

    def _what_it_is(self) -> str:
        inside = sorted(child.parent.name for child in self.folder.glob(f"*/{CONFIG_NAME}"))
        if inside:
            return f"; there are adapters in its folders {', '.join(inside)}"
        return "; this is a whole model" if (self.folder / "config.json").exists() else ""

    def _open_weights(self) -> Any:
        if not self.weights_path.exists():
            pickled = (self.folder / WEIGHTS_NAME).exists()
            why = f"; {WEIGHTS_NAME} is a pickle, save the adapter again as safetensors" if pickled else ""
            raise InputError(f"{self.folder} holds no weights: {SAFETENSORS_WEIGHTS_NAME} is missing{why}")
        try:
            file = safe_open(self.weights_path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.weights_path} is damaged or no safetensors file: {error}") from error
        try:
            check_checksum(self.weights_path)
        except ValueError as error:
            raise InputError(str(error)) from error
        return file


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """Sorting key with which layer 10 comes after layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def grouped_by_module(names: Iterator[str] | list[str], marker: str) -> dict[str, dict[str, str]]:
    """Tensor names by module and by what follows `marker` in them.

    Args:
        names: Names such as `layers.0.up_proj.sparsegrad_adapter.support`.
        marker: For instance `sparsegrad_`.

    Returns:
        Such as `{"layers.0.up_proj": {"adapter.support": name}}`, in the order of `names`.
    """
    modules: dict[str, dict[str, str]] = {}
    for name in names:
        module, found, part = name.partition(f".{marker}")
        if found:
            modules.setdefault(module, {})[part] = name
    return modules
