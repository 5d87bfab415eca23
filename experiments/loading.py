"""Checkpoints that may not be there, and the device that they are put on."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from peft_sparsegrad.cli.base_models import load_pretrained
from peft_sparsegrad.cli.errors import InputError

__all__ = ["DEVICE", "load_pretrained", "quantization"]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def quantization(bits: str, compute_dtype: torch.dtype, **further: Any) -> BitsAndBytesConfig:
    """Return the settings of bitsandbytes for weights in `bits`, "4bit" or "8bit".

    Raises:
        InputError: If bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise InputError(f"{bits} weights need bitsandbytes: pip install bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=bits == "4bit",
        load_in_8bit=bits == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute_dtype,
        **further,
    )
