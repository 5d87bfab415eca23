"""`peft-sparsegrad plot`: pictures of adapters, warm-up reports and training logs."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from peft.utils import CONFIG_NAME

from ..sparsegrad import WarmUpReport
from .errors import InputError
from .files import check_file, replacing_file
from .output import print_json
from .plot_adapter import (
    GradientSettings,
    draw_active,
    draw_gradient,
    draw_support,
    heat_map,
    magnitudes,
    output_rows,
)
from .saved.adapter import SavedAdapter
from .saved.methods import METHODS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SUFFIXES = (".png", ".svg", ".pdf")
Log = list[dict[str, Any]]


class Kind(str, Enum):
    """Kinds of pictures."""

    support = "support"
    active = "active"
    spectra = "spectra"
    energy = "energy"
    gradient = "gradient"
    magnitudes = "magnitudes"
    rows = "rows"


_NEEDS = {
    **{Kind(kind): f"a {name} adapter" for name, method in METHODS.items() for kind in method.plots},
    Kind.spectra: "a warm-up report",
    Kind.energy: "a Trainer's log",
}

_GRADIENTS = {Kind.gradient: heat_map, Kind.magnitudes: magnitudes, Kind.rows: output_rows}


def plot_command(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="ADAPTER|REPORT",
            help="Folder of an adapter, a report of `warmup --report`, or a Trainer's trainer_state.json.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Picture to write: .png, .svg or .pdf.", show_default=False)],
    kind: Annotated[
        Kind | None,
        typer.Option(
            help="support: where the trained entries lie. active: GradDrop's entries that train in each layer and "
            "epoch. spectra: what a warm-up found. energy: gradient energy captured over training. gradient, "
            "magnitudes: a layer's gradient before and after the change of basis. rows: the gradient of its output, "
            "token by token. These three need --data. "
            "Default: support, active, spectra or energy, as the source has it.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Text or labelled sentences, as of `warmup`, for a gradient.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model, folder or hub id. Default: the one that the adapter names.")
    ] = None,
    module: Annotated[
        str | None, typer.Option(help="Layer whose gradient is drawn. Default: the middle one of the adapter.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Epochs of a GradDrop run. Default: as its settings say.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences of the gradient.")] = 8,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens in a sequence of the gradient.")] = 128,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was drawn as JSON.")] = False,
) -> None:
    """Draw what an adapter, a warm-up report or a training log holds.

    Exit status: 0, or 2 if there is nothing of the kind to draw. Nothing is written then.
    """
    check_file(out, overwrite, _SUFFIXES)
    found = read_source(source)
    chosen = kind or _usual_kind(found)
    try:
        figure = draw(found, chosen, base, epochs, GradientSettings(data, module, batch_size, max_length))
    except ImportError as error:
        if error.name != "matplotlib":
            raise
        raise InputError(str(error)) from error
    except ValueError as error:
        raise InputError(f"{source}: {error}") from error
    with replacing_file(out) as path:
        figure.savefig(path, format=out.suffix[1:])
    if as_json:
        print_json({"kind": chosen.value, "out": str(out)})
    else:
        print(f"{chosen.value}: {out}")


def read_source(path: Path) -> SavedAdapter | WarmUpReport | Log:
    """The adapter, the warm-up report or the Trainer's log at `path`.

    Raises:
        InputError: If it is none of these, or damaged.
    """
    if path.suffix != ".json" or path.is_dir() or path.name == CONFIG_NAME:
        return SavedAdapter(path)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(entries, dict) and isinstance(entries.get("log_history"), list):
            return entries["log_history"]
        return WarmUpReport.from_dict(entries)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is neither a report of this version's `warmup --report` nor a trainer_state.json"
        ) from error


def draw(
    source: SavedAdapter | WarmUpReport | Log,
    kind: Kind,
    base: str | None = None,
    epochs: int | None = None,
    gradient: GradientSettings | None = None,
) -> Figure:
    """The picture `kind` of a source.

    Raises:
        InputError: If the source is not what such a picture is made of.
        ImportError: If matplotlib is not installed.
    """
    from .. import plots

    if kind is Kind.spectra and isinstance(source, WarmUpReport):
        return plots.spectra(source)
    if kind is Kind.energy and isinstance(source, list):
        return plots.energy_over_training(source)
    if isinstance(source, SavedAdapter) and kind.value in _plots(source):
        if kind is Kind.active:
            return draw_active(source, base, epochs)
        if kind is Kind.support:
            return draw_support(source)
        return draw_gradient(source, _GRADIENTS[kind], base, gradient or GradientSettings())
    raise InputError(f"{kind.value} is drawn of {_NEEDS[kind]}, and this is {_what(source)}")


def _usual_kind(source: SavedAdapter | WarmUpReport | Log) -> Kind:
    if isinstance(source, SavedAdapter):
        return Kind(next(iter(_plots(source)), "support"))
    return Kind.spectra if isinstance(source, WarmUpReport) else Kind.energy


def _plots(adapter: SavedAdapter) -> tuple[str, ...]:
    """Return what can be drawn of an adapter, the default first."""
    return METHODS[adapter.method].plots if adapter.method in METHODS else ()


def _what(source: SavedAdapter | WarmUpReport | Log) -> str:
    if isinstance(source, SavedAdapter):
        return f"a {source.method} adapter"
    return "a warm-up report" if isinstance(source, WarmUpReport) else "a Trainer's log"
