"""The interface of a method whose saved adapters the command line can read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from .adapter import SavedAdapter


@dataclass(frozen=True)
class WeightLayout:
    """The way in which the base model stores a weight.

    Attributes:
        shape: (out, in).
        transposed: Whether it is stored as (in, out), as transformers' Conv1D does.
    """

    shape: tuple[int, int]
    transposed: bool = False


class SavedSupport(NamedTuple):
    """The entries of a layer that train.

    Attributes:
        indices: Sorted flat positions, int64 (k,), or None where all of them train.
        basis: The matrices that say what a position means; two supports on different ones cannot be compared.
    """

    indices: torch.Tensor | None
    basis: tuple[torch.Tensor | None, ...]


@dataclass(frozen=True)
class EntriesDelta:
    """A change of a weight or bias, entry by entry in its own layout.

    Attributes:
        positions: Sorted flat positions of the values, int64 (k,), or None for all of them.
        values: Float32, (k,).
        shape: Shape of the whole.
    """

    positions: torch.Tensor | None
    values: torch.Tensor
    shape: tuple[int, ...]

    @property
    def changed(self) -> torch.Tensor:
        """Sorted flat positions of the entries that are not zero."""
        nonzero = self.values.nonzero().flatten()
        return nonzero if self.positions is None else self.positions[nonzero]

    def dense(self) -> torch.Tensor:
        """The whole change, float32."""
        positions = torch.arange(len(self.values)) if self.positions is None else self.positions
        entries = torch.zeros(torch.Size(self.shape).numel())
        return entries.index_copy(0, positions, self.values).view(self.shape)


class Table(NamedTuple):
    """A table for `inspect`."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]


class SavedMethod(ABC):
    """A saved adapter, read as its method stores it.

    Args:
        adapter: The adapter. Its tensors are read one at a time, when they are asked for.

    Attributes:
        peft_type: PEFT's name of the method, in capitals.
        converts_to_lora: Whether `convert --to lora` takes it.
        plots: What `plot` can draw of it, the default first.

    Raises:
        InputError: If the settings or the names of the tensors are not those of the method.
    """

    peft_type: ClassVar[str]
    converts_to_lora: ClassVar[bool] = False
    plots: ClassVar[tuple[str, ...]] = ()

    def __init__(self, adapter: SavedAdapter) -> None:
        self.adapter = adapter

    @property
    @abstractmethod
    def modules(self) -> dict[str, tuple[int, int] | None]:
        """(out, in) of every weight that is changed; None where only the base model can tell which side is which."""

    @abstractmethod
    def delta(self, module: str, layout: WeightLayout) -> torch.Tensor:
        """Return ΔW (out, in) in float32 of a module whose weight is stored like that.

        Raises:
            InputError: If the adapter is for a weight of another shape, or damaged.
        """

    def support(self, module: str) -> SavedSupport | None:
        """Return the entries of a module that train; None if the method chooses none."""
        return None

    @property
    def parameters(self) -> list[str]:
        """Weights and biases that are stored entry by entry, so that two adapters can be compared without a layout."""
        return []

    def entries(self, parameter: str) -> EntriesDelta:
        """Return the change of one of `parameters`."""
        raise KeyError(parameter)

    def facts(self) -> dict[str, list[Any]]:
        """Return what `inspect` says of this adapter and of no other method's: fields of `Inspection`."""
        return {}

    @classmethod
    def tables(cls, facts: dict[str, Any]) -> list[Table]:
        """Return the facts as tables."""
        return []
