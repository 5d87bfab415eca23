"""`peft-sparsegrad inspect`: what is in an adapter, from its two files alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..common.files.model_card import settings_of
from .output import new_console, percent, print_facts, print_json, print_layers, print_table
from .saved.adapter import SavedAdapter
from .saved.graddrop import ChangedTensor
from .saved.methods import METHODS, NEED_THE_IMPORT, read_method
from .saved.sparsegrad_facts import GroupFacts, LayerFacts


@dataclass
class Inspection:
    """Result of `inspect`.

    Attributes:
        method: The PEFT type.
        base_model: Name of the base model, None if the adapter does not say.
        task_type: As in the settings.
        target_modules: As in the settings.
        settings: The settings that have a value.
        parameters: Numbers in the file.
        bytes: Of the weights file.
        bytes_by_part: Bytes of the tensors, by what they are.
        groups: Of a SparseGrad adapter, its transition matrices.
        layers: Of a SparseGrad adapter, its layers.
        tensors: Of a GradDrop adapter, what changed.
    """

    method: str
    base_model: str | None
    task_type: str | None
    target_modules: list[str] | str | None
    settings: dict[str, Any]
    parameters: int
    bytes: int
    bytes_by_part: dict[str, int]
    groups: list[GroupFacts] = field(default_factory=list)
    layers: list[LayerFacts] = field(default_factory=list)
    tensors: list[ChangedTensor] = field(default_factory=list)


def inspect_command(
    adapter: Annotated[Path, typer.Argument(help="Folder of a saved adapter.", show_default=False)],
    every: Annotated[bool, typer.Option("--all", help="A line for each layer of a deep model.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")] = False,
) -> None:
    """Say what is in an adapter: method, settings, groups, layers, norms and bytes.

    Reads the adapter's two files and neither the base model nor the hub.

    Exit status: 0, or 2 if the adapter cannot be read.
    """
    inspection = inspect_adapter(adapter)
    if as_json:
        print_json(inspection)
    else:
        _show(new_console(), inspection, every)


def inspect_adapter(path: Path) -> Inspection:
    """Look into the adapter in a folder, one tensor at a time.

    Raises:
        InputError: If there is none, or one of its files is damaged.
    """
    adapter = SavedAdapter(path)
    config = adapter.config
    inspection = Inspection(
        method=adapter.method,
        base_model=config.get("base_model_name_or_path"),
        task_type=config.get("task_type"),
        target_modules=config.get("target_modules"),
        settings=settings_of(config),
        parameters=sum(info.numel for info in adapter.tensors.values()),
        bytes=adapter.weights_path.stat().st_size,
        bytes_by_part=_bytes_by_part(adapter),
    )
    return replace(inspection, **read_method(adapter).facts()) if adapter.method in METHODS else inspection


def _bytes_by_part(adapter: SavedAdapter) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for name, info in adapter.tensors.items():
        sizes[_part(name, adapter.method)] += info.nbytes
    return dict(sizes.most_common())


def _part(name: str, method: str) -> str:
    """Return the end of a tensor's name, from the method's prefix on; "saved in full" for another module's."""
    parts = name.split(".")
    start = next((i for i, part in enumerate(parts) if part.startswith(f"{method.lower()}_")), None)
    if start is not None:
        return ".".join(parts[start:]).removeprefix(f"{method.lower()}_")
    return "saved in full" if method in METHODS else parts[-1]


def _show(console: Console, found: Inspection, every: bool) -> None:
    targets = found.target_modules
    facts = [
        ("method", found.method),
        ("base model", found.base_model),
        ("task", found.task_type),
        ("targets", targets if isinstance(targets, str) or targets is None else ", ".join(sorted(targets))),
        ("settings", ", ".join(f"{key}={value}" for key, value in sorted(found.settings.items()))),
        ("trained values", f"{sum(layer.values for layer in found.layers):,}" if found.layers else None),
        ("numbers in the file", f"{found.parameters:,}"),
        ("bytes", f"{found.bytes:,}"),
        ("to load it", "import peft_sparsegrad" if found.method in NEED_THE_IMPORT else None),
    ]
    print_facts(console, facts)
    size = sum(found.bytes_by_part.values()) or 1
    parts = [(name, f"{count:,}", percent(count / size)) for name, count in found.bytes_by_part.items()]
    print_table(console, "Bytes", ("part", "bytes", "share"), parts)
    for table in METHODS[found.method].tables(vars(found)) if found.method in METHODS else []:
        print_layers(console, *table, every=every)
    for name, count in _non_finite(found):
        console.print(f"[bold red]{count:,} values of {name} are NaN or infinite: the training run diverged")


def _non_finite(found: Inspection) -> list[tuple[str, int]]:
    counts = [(layer.module, layer.non_finite) for layer in found.layers]
    counts += [(tensor.parameter, tensor.non_finite) for tensor in found.tensors]
    return [(name, count) for name, count in counts if count]
