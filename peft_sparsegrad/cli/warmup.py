"""`peft-sparsegrad warmup`: SparseGrad's transition matrices once, for a whole search over learning rates."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import PeftModel, get_peft_model
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    set_seed,
)

from ..sparsegrad import SparseGradConfig, WarmUpReport, save_transition_matrices
from ..sparsegrad.config import NAMED_RANKS
from ..sparsegrad.layer import layer_adapters
from ..sparsegrad.warmup.explicit import warmup
from ..sparsegrad.warmup.passes import batch_loss
from ..sparsegrad.warmup.task_head import settle_head
from .base_models import load_pretrained
from .data import Batch, is_labelled, labelled_batches, language_batches, read_labelled, read_texts
from .errors import InputError
from .files import check_file, replacing_file
from .output import new_console, print_json

_ADAPTER = "default"
_HEADS = ("classifier", "pre_classifier", "score")
_HEAD_LR = 1e-3


@dataclass(frozen=True)
class WarmUpSettings:
    """Settings of the `warmup` command, under the names of its options."""

    density: float = 0.01
    rank: int | tuple[int, int] | str = "auto"
    target_modules: list[str] | None = None
    steps: int = 8
    head_steps: int = 0
    batch_size: int = 8
    max_length: int = 128
    seed: int = 0


def warmup_command(
    model: Annotated[str, typer.Option(help="Base model: a folder or a hub id.", show_default=False)],
    data: Annotated[
        Path,
        typer.Option(
            help="Text (.txt, .jsonl) for a causal language model, or labelled sentences (.tsv, .csv with the columns "
            "`sentence` and `label`, or CoLA's) for a classifier.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="File for the matrices, .safetensors.", show_default=False)],
    report: Annotated[
        Path | None, typer.Option(help="File for the report, .json, which `plot` reads. Default: none.")
    ] = None,
    density: Annotated[float, typer.Option(help="Trained share of each weight's entries, in (0, 1].")] = 0.01,
    rank: Annotated[
        str, typer.Option(help="Columns of the matrices: a number, two (OUT,IN), `full`, `auto` or `narrower`.")
    ] = "auto",
    target_modules: Annotated[
        str | None, typer.Option(help="Layers to adapt, separated by commas. Default: the MLP layers.")
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Batches to look at, one backward pass each.")] = 8,
    head_steps: Annotated[int, typer.Option(min=0, help="Steps for a new task head before that.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in a batch.")] = 8,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens in a sequence.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of the data and of a new head.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out and --report.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Find the bases and the supports for a model and its data, and save them.

    Training uses them in place of a warm-up of its own: SparseGradConfig(transition_matrices=FILE), with the same
    density, rank and target modules.

    Exit status: 0, or 2 if the model or the data cannot be used. Nothing is written then.
    """
    targets = None if target_modules is None else [name.strip() for name in target_modules.split(",")]
    settings = WarmUpSettings(density, _parse_rank(rank), targets, steps, head_steps, batch_size, max_length, seed)
    check_file(out, overwrite, (".safetensors",))
    if report is not None:
        check_file(report, overwrite, (".json",))
    found, matrices = warm_up(model, data, settings, progress=not as_json)
    with ExitStack() as files:  # both or none, but for the moment between two renamings
        if report is not None:
            found.to_json(files.enter_context(replacing_file(report)))
        save_transition_matrices(matrices, files.enter_context(replacing_file(out)), _ADAPTER)
    if as_json:
        print_json(found.to_dict())
    else:
        new_console().print(f"{found}\n\ntransition matrices: {out} ({out.stat().st_size:,} bytes)", markup=False)


def warm_up(model: str, data: Path, settings: WarmUpSettings, progress: bool = True) -> tuple[WarmUpReport, PeftModel]:
    """Warm up a SparseGrad adapter on `model` with the batches of `data`.

    Returns:
        What was found, and the model with it.

    Raises:
        InputError: If the model, the data or the settings cannot be used.
    """
    set_seed(settings.seed)
    base, batches = load_model_and_batches(model, data, settings)
    try:
        adapted = _adapt(base.to("cuda" if torch.cuda.is_available() else "cpu"), settings, is_labelled(data))
        if settings.head_steps:
            _settle_head(adapted, batches, settings.head_steps)
        found = warmup(adapted, batches, settings.steps, progress=progress)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error
    return found, adapted


def load_model_and_batches(model: str, data: Path, settings: WarmUpSettings) -> tuple[Any, list[Batch]]:
    """A classifier and labelled sentences, or a causal language model and text, as the data file has it."""
    sentences = read_labelled(data) if is_labelled(data) else None
    if sentences is not None and len(sentences.names) < 2:
        raise InputError(f"{data} has one label alone, {sentences.names[0]!r}: there is nothing to tell apart")
    tokenizer = load_pretrained(AutoTokenizer, model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    sizes = (settings.steps, settings.batch_size, settings.max_length, settings.seed)
    config = load_pretrained(AutoConfig, model)
    if sentences is not None:
        sentences = sentences.numbered_as(config.label2id) or sentences
        batches = labelled_batches(sentences, tokenizer, *sizes)
        kind, head = AutoModelForSequenceClassification, {"num_labels": len(sentences.names)}
    else:
        _check_reads_forward(config, data)
        batches = language_batches(read_texts(data, tokenizer), tokenizer, *sizes)
        kind, head = AutoModelForCausalLM, {}
    base = load_pretrained(kind, model, dtype="auto", pad_token_id=tokenizer.pad_token_id, **head)
    longest = getattr(base.config, "max_position_embeddings", None)
    if longest is not None and settings.max_length > longest:
        raise InputError(f"--max-length {settings.max_length} is more than the {longest} tokens that {model} can read")
    return base, batches


def _check_reads_forward(config: PretrainedConfig, data: Path) -> None:
    """Raise an InputError for an encoder, which sees the token that a causal language model would have to guess."""
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not config.is_encoder_decoder
    if masked and not getattr(config, "is_decoder", False):
        raise InputError(
            f"{data} is text for a causal language model, and {config.model_type} is an encoder: give labelled "
            "sentences (.tsv, .csv), or call `peft_sparsegrad.warmup` with batches of its masked language modelling"
        )


def _adapt(base: Any, settings: WarmUpSettings, labelled: bool) -> PeftModel:
    heads = [name for name, _ in base.named_children() if name in _HEADS]
    config = SparseGradConfig(
        density=settings.density,
        rank=settings.rank,  # pyright: ignore[reportArgumentType]
        target_modules=settings.target_modules,
        modules_to_save=heads if labelled and settings.head_steps else None,
        warmup_steps=settings.steps,
    )
    model: Any = get_peft_model(base, config)
    return model.train()  # as it will train: with dropout


def _settle_head(model: Any, batches: list[Batch], steps: int) -> None:
    """Train the head alone: what a new one's gradients say has little to do with the task."""
    device = next(model.parameters()).device
    losses = (
        batch_loss(model, {key: tensor.to(device) for key, tensor in batch.items()}, index)
        for index, batch in itertools.cycle(enumerate(batches))
    )
    settle_head(model, lambda: next(losses), steps, _HEAD_LR, layer_adapters(model, _ADAPTER))


def _parse_rank(text: str) -> int | tuple[int, int] | str:
    if text in NAMED_RANKS:
        return text
    try:
        numbers = [int(part) for part in text.split(",")]
        rank_out, rank_in = numbers if len(numbers) > 1 else numbers * 2
    except ValueError as error:
        raise InputError(
            f"--rank must be a number, two (OUT,IN), `full`, `auto` or `narrower`, not {text!r}"
        ) from error
    return (rank_out, rank_in) if len(numbers) > 1 else rank_out
