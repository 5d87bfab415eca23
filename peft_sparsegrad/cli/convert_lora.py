"""`peft-sparsegrad convert --to lora`: a LoRA adapter, its size before it is written, and what a text says of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel

from ..common.lora_conversion import LoraConversion, convert_to_lora
from .base_models import load_tokenizer
from .data import Batch, language_batches, read_texts
from .errors import InputError
from .files import replacing_folder
from .saved.adapter import SavedAdapter

_SEQUENCES = 8


@dataclass(frozen=True)
class LoraOptions:
    """Options of `convert` that are for `--to lora` alone.

    Attributes:
        rank: Rank of every module; None for an exact conversion.
        linear_only: Leave out what a LoRA adapter cannot hold.
        data: Text on which to measure the change of the output, or None.
        max_length: Tokens in a sequence of that text.
    """

    rank: int | None = None
    linear_only: bool = False
    data: Path | None = None
    max_length: int = 128

    def given(self) -> list[str]:
        """Return the options that were set, as they are typed."""
        named = {"--rank": self.rank, "--linear-only": self.linear_only, "--data": self.data}
        return [name for name, value in named.items() if value not in (None, False)]


def write_lora(
    adapter: SavedAdapter,
    model: PeftModel,
    base: str | None,
    out: Path,
    options: LoraOptions,
    announce: Callable[[str], None],
) -> LoraConversion:
    """Convert the adapter of `model`, announce the size of the result, and write it to the folder `out`.

    Raises:
        InputError: If the adapter or the text cannot be used. Nothing is written then.
    """
    batch = None if options.data is None else _batch(adapter, base, options.data, options.max_length)
    try:
        conversion = convert_to_lora(model, options.rank, batch=batch, linear_only=options.linear_only)
    except ValueError as error:
        raise InputError(str(error)) from error
    announce(
        f"LoRA of rank {conversion.config.r}: {conversion.num_bytes:,} bytes; the adapter has "
        f"{adapter.weights_path.stat().st_size:,}"
    )
    with replacing_folder(out) as folder:
        conversion.save(folder)
    return conversion


def _batch(adapter: SavedAdapter, base: str | None, data: Path, max_length: int) -> Batch:
    if adapter.config.get("task_type") != "CAUSAL_LM":
        raise InputError(f"--data is for a causal language model, and {adapter.folder} has another `task_type`")
    tokenizer = load_tokenizer(adapter, base)
    if tokenizer is None:
        raise InputError("--data needs a tokenizer, and there is none beside the adapter or the base model")
    return language_batches(read_texts(data, tokenizer), tokenizer, 1, _SEQUENCES, max_length, seed=0)[0]
