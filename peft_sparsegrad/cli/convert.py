"""`peft-sparsegrad convert`: an adapter as LoRA, as a whole model, or as plain weight changes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from rich.console import Console
from safetensors.torch import load_file, save_file

from ..common.lora_conversion import LoraConversion
from ..common.output_change import OutputChange
from .base_models import load_adapted, load_tokenizer
from .convert_lora import LoraOptions, write_lora
from .errors import InputError
from .files import check_file, check_folder, replacing_file, replacing_folder
from .output import errors_only, new_console, print_facts, print_json, print_layers
from .saved.adapter import SavedAdapter
from .saved.methods import METHODS

_ADAPTER = "default"
DenseDelta = tuple[torch.Tensor, torch.Tensor | None]  # of the weight, in its own layout, and of the bias


class Target(str, Enum):
    """Kinds of output of `convert`."""

    lora = "lora"
    merged = "merged"
    dense = "dense"


@dataclass
class Conversion:
    """Result of `convert`.

    Attributes:
        to: What the adapter was converted to.
        out: Where it is.
        largest_error: The largest of `errors`.
        errors: Module to ‖ΔW − what was written‖ / ‖ΔW‖, in the Frobenius norm.
        tokenizer: Of a merged model, whether a tokenizer was found and written with it.
        num_bytes: Size of a LoRA adapter's tensors.
        adapter_bytes: Size of the file that it was made of.
        output_change: What the LoRA adapter does to the output on `--data`.
    """

    to: str
    out: str
    largest_error: float
    errors: dict[str, float]
    tokenizer: bool | None = None
    num_bytes: int | None = None
    adapter_bytes: int | None = None
    output_change: OutputChange | None = None


def convert_command(
    adapter: Annotated[Path, typer.Argument(help="Folder of a saved adapter.", show_default=False)],
    to: Annotated[
        Target,
        typer.Option(
            help="lora: a LoRA adapter, of GradDrop with a --rank. merged: the base model with the change in its "
            "weights. dense: a safetensors file with the change of every weight, float32.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder to write; with --to dense a .safetensors file.", show_default=False)
    ],
    base: Annotated[
        str | None, typer.Option(help="Base model, folder or hub id. Default: the one that the adapter names.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="With --to lora, rank of every module. Default: as exactness needs.")
    ] = None,
    linear_only: Annotated[
        bool, typer.Option("--linear-only", help="With --to lora, leave out trained biases and normalisation layers.")
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(help="With --to lora, text (.txt, .jsonl) on which to measure the loss before and after."),
    ] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens in a sequence of --data.")] = 128,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files in --out.")] = False,
    every: Annotated[bool, typer.Option("--all", help="A line for each layer of a deep model.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")] = False,
) -> None:
    """Convert an adapter, and say how much of it is lost.

    Exit status: 0, or 2 if the adapter cannot be converted. Nothing is written then.
    """
    lora, console = LoraOptions(rank, linear_only, data, max_length), new_console()
    announce = _be_silent if as_json else console.print
    conversion = convert_adapter(adapter, to, out, base, overwrite, lora, announce)
    if as_json:
        print_json(conversion)
    else:
        _show(console, conversion, every)


def _be_silent(_: str) -> None:
    """Say nothing of the progress: the output is for a program."""


def convert_adapter(
    path: Path,
    to: Target,
    out: Path,
    base: str | None,
    overwrite: bool,
    lora: LoraOptions,
    announce: Callable[[str], None],
) -> Conversion:
    """Convert the adapter in the folder `path`. The arguments are those of the command line.

    `announce` is called with the size of a LoRA adapter before it is written.

    Raises:
        InputError: If it cannot be converted, or `out` must not be written.
    """
    adapter = SavedAdapter(path)
    can = [name for name, method in METHODS.items() if method.converts_to_lora or to is not Target.lora]
    if adapter.method not in can:
        raise InputError(f"a {adapter.method} adapter cannot be converted to {to.value}; these can: {', '.join(can)}")
    if to is not Target.lora and lora.given():
        raise InputError(f"{lora.given()[0]} is for --to lora: the others lose nothing")
    if out.resolve() == adapter.folder.resolve():
        raise InputError(f"--out {out} is the adapter itself: name another folder")
    check_file(out, overwrite, (".safetensors",)) if to is Target.dense else check_folder(out, overwrite)
    with errors_only("bitsandbytes"):
        model = load_adapted(adapter, base)
        _check_finite(adapter, model)
        if to is Target.lora:
            return _to_lora(adapter, write_lora(adapter, model, base, out, lora, announce), out)
        return _to_merged(adapter, model, base, out) if to is Target.merged else _to_dense(model, out)


def _check_finite(adapter: SavedAdapter, model: PeftModel) -> None:
    for name, layer in _adapted_layers(model).items():
        if not all(torch.isfinite(delta).all() for delta in _delta(layer) if delta is not None):
            raise InputError(f"{adapter.folder} has NaN or infinite values at {name!r}: the training run diverged")


def _to_lora(adapter: SavedAdapter, written: LoraConversion, out: Path) -> Conversion:
    return Conversion(
        "lora",
        str(out),
        written.largest_error,
        written.errors,
        num_bytes=written.num_bytes,
        adapter_bytes=adapter.weights_path.stat().st_size,
        output_change=written.output_change,
    )


def _to_merged(adapter: SavedAdapter, model: PeftModel, base: str | None, out: Path) -> Conversion:
    errors = {name: _merge(layer) for name, layer in _adapted_layers(model).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT: that the layers are merged already
        merged: Any = model.merge_and_unload()
    tokenizer = load_tokenizer(adapter, base)
    with replacing_folder(out) as folder:
        merged.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return Conversion("merged", str(out), max(errors.values()), errors, tokenizer is not None)


def _to_dense(model: PeftModel, out: Path) -> Conversion:
    """Write `MODULE.weight`, and `MODULE.bias` where a bias changed, in the base model's layout."""
    if any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules()):
        raise InputError(
            "the adapter also trains `modules_to_save` or tokens, which --to dense leaves out: use --to merged"
        )
    deltas = {name: _delta(layer) for name, layer in _adapted_layers(model).items()}
    tensors = {f"{name}.weight": weight.contiguous() for name, (weight, _) in deltas.items()}
    tensors |= {f"{name}.bias": bias.float() for name, (_, bias) in deltas.items() if bias is not None}
    with replacing_file(out) as path:
        save_file(tensors, path, metadata={"format": "pt"})
    written = load_file(out)
    errors = {name: _relative_error(weight, written[f"{name}.weight"]) for name, (weight, _) in deltas.items()}
    return Conversion("dense", str(out), max(errors.values()), errors)


def _adapted_layers(model: PeftModel) -> dict[str, Any]:
    """The layers with a delta, by the names that they have in the base model."""
    return {
        name: module
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, BaseTunerLayer) and hasattr(module, "get_delta_weight")
    }


def _merge(layer: Any) -> float:
    """Merge one layer. Returns by how much its weight changed otherwise than it should, in the base's precision."""
    before, (delta, _) = layer.get_base_weight().detach().clone().float().cpu(), _delta(layer)
    layer.merge(adapter_names=[_ADAPTER])
    return _relative_error(delta, layer.get_base_weight().detach().float().cpu() - before)


def _delta(layer: Any) -> DenseDelta:
    bias = layer.get_delta_bias(_ADAPTER) if hasattr(layer, "get_delta_bias") else None
    return layer.get_delta_weight(_ADAPTER).detach().float().cpu(), bias


def _relative_error(delta: torch.Tensor, written: torch.Tensor) -> float:
    norm = delta.norm().item()
    return (delta - written.to(delta)).norm().item() / norm if norm else 0.0


def _show(console: Console, conversion: Conversion, every: bool) -> None:
    facts: list[tuple[str, Any]] = [
        ("written", f"{conversion.out} ({conversion.to})"),
        ("largest error ‖ΔW − written‖ / ‖ΔW‖", f"{conversion.largest_error:.2e}"),
    ]
    if (change := conversion.output_change) is not None:
        losses = (change.loss_base, change.loss_adapter, change.loss_lora)
        facts.append(("loss of the base, the adapter and the LoRA", ", ".join(f"{loss:.4f}" for loss in losses)))
        facts.append(("share of the adapter's effect on the logits that is lost", f"{change.relative:.2e}"))
    if conversion.tokenizer is False:
        facts.append(("tokenizer", "none was found beside the adapter or the base model"))
    print_facts(console, facts)
    rows = [(name, f"{error:.2e}") for name, error in conversion.errors.items()]
    print_layers(console, "Reconstruction", ("module", "relative error"), rows, every=every)
