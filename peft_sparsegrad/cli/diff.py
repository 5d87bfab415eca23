"""`peft-sparsegrad diff`: how far two adapters are apart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .diff_deltas import LayerDistance, layer_distances, overall
from .diff_tensors import TensorDistance, tensor_distances
from .errors import InputError
from .output import new_console, percent, print_facts, print_json, print_table
from .saved.adapter import SavedAdapter
from .saved.methods import METHODS

# Written by the library and no setting of the adapter.
_IGNORED = {"auto_mapping", "format_version", "inference_mode", "peft_version"}


@dataclass
class Difference:
    """Difference of two adapters.

    Attributes:
        same: Whether settings and tensors are the same.
        config: Setting to its values in the two.
        distance: ‖ΔA − ΔB‖ / ‖ΔA‖ over all layers; None if the methods have no delta that can be read.
        cosine: ⟨ΔA, ΔB⟩ / (‖ΔA‖ ‖ΔB‖) over all layers; None where `distance` is, or if one is zero.
        layers: The same layer by layer, with the overlap of the supports.
        supports: Why the supports were not compared; None if they were.
        tensors: Other tensors that differ; all tensors where there is no delta.
    """

    same: bool
    config: dict[str, tuple[Any, Any]]
    distance: float | None
    cosine: float | None
    layers: list[LayerDistance]
    supports: str | None
    tensors: list[TensorDistance]


def diff_command(
    a: Annotated[Path, typer.Argument(metavar="A", help="Folder of an adapter.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Folder of another.", show_default=False)],
    base: Annotated[
        str | None,
        typer.Option(
            help="Base model, folder or hub id. Only its configuration is read, and only where the adapters do not "
            "tell the shapes of the weights. Default: what A names.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")] = False,
) -> None:
    """Compare two adapters: settings, distance of their deltas layer by layer, overlap of their supports.

    The deltas of SparseGrad, GradDrop and LoRA adapters are compared with each other, on the same layers; of any other
    method the tensors, with an adapter of the same method.

    Exit status: 0 if they are the same, 1 if they differ, 2 if they cannot be compared.
    """
    difference = diff_adapters(a, b, base)
    if as_json:
        print_json(difference)
    else:
        _show(new_console(), difference)
    raise typer.Exit(0 if difference.same else 1)


def diff_adapters(path_a: Path, path_b: Path, base: str | None = None) -> Difference:
    """Compare the adapters in two folders.

    Raises:
        InputError: If one cannot be read, or they are on different layers.
    """
    a, b = SavedAdapter(path_a), SavedAdapter(path_b)
    config = _config_differences(a, b)
    layers, supports = [], None
    if {a.method, b.method} <= METHODS.keys():
        layers, supports = layer_distances(METHODS[a.method](a), METHODS[b.method](b), base)
    elif a.method != b.method:
        raise InputError(
            f"a {a.method} and a {b.method} adapter cannot be compared: the weights of {', '.join(METHODS)} can"
        )
    total, tensors = overall(layers), tensor_distances(a, b)
    return Difference(
        same=not config and not tensors,
        config=config,
        distance=total.distance if total else None,
        cosine=total.cosine if total else None,
        layers=layers,
        supports=supports,
        tensors=[each for each in tensors if not (layers and each.carries_delta)],
    )


def _config_differences(a: SavedAdapter, b: SavedAdapter) -> dict[str, tuple[Any, Any]]:
    """Settings that differ; of two methods only those that both have."""
    keys = a.config.keys() & b.config.keys() if a.method != b.method else a.config.keys() | b.config.keys()
    pairs = {key: (a.config.get(key), b.config.get(key)) for key in sorted(keys - _IGNORED)}
    return {key: pair for key, pair in pairs.items() if _differ(*pair)}


def _differ(a: Any, b: Any) -> bool:
    """Return whether two settings differ; the order of a list of names has no meaning."""
    if isinstance(a, list) and isinstance(b, list):
        return sorted(map(str, a)) != sorted(map(str, b))
    return a != b


def _show(console: Console, found: Difference) -> None:
    if found.same:
        console.print("The adapters are the same.")
        return
    print_facts(
        console,
        [
            ("‖ΔA − ΔB‖ / ‖ΔA‖", None if found.distance is None else f"{found.distance:.3g}"),
            ("cosine of ΔA and ΔB", None if found.cosine is None else f"{found.cosine:.4f}"),
            ("supports", f"not compared: {found.supports}" if found.supports else None),
        ],
    )
    if found.config:
        rows = [(key, str(a), str(b)) for key, (a, b) in found.config.items()]
        print_table(console, "Settings that differ", ("setting", "A", "B"), rows)
    if found.layers:
        columns = ("module", "‖ΔA‖", "‖ΔB‖", "‖ΔA − ΔB‖ / ‖ΔA‖", "cosine", "overlap of supports")
        print_table(console, "Layers", columns, [_layer_row(layer) for layer in found.layers])
    if found.tensors:
        columns = ("tensor", "‖A‖", "‖B‖", "‖A − B‖ / ‖A‖")
        rows = [
            (each.name, *(_number(x) or each.note for x in (each.norm_a, each.norm_b, each.distance)))
            for each in found.tensors
        ]
        print_table(console, "Other tensors that differ", columns, rows)


def _layer_row(layer: LayerDistance) -> tuple[Any, ...]:
    numbers = (layer.norm_a, layer.norm_b, layer.distance)
    cosine = None if layer.cosine is None else f"{layer.cosine:.4f}"
    return (layer.module, *map(_number, numbers), cosine, percent(layer.overlap))


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.3g}"
