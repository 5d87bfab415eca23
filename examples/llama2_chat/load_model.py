"""The base model in a precision, and a fine-tuned model from its folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from experiments.json_files import read_json
from experiments.loading import DEVICE, load_pretrained, quantization
from peft_sparsegrad.cli.errors import InputError

from .run_folder import RUN_FILE

PRECISIONS = ("4bit", "8bit", "bf16", "float32")


def is_quantized(precision: str) -> bool:
    return precision in ("4bit", "8bit")


def load_base(path: str | Path, precision: str) -> Any:
    """A causal language model whose weights are held in `precision`, one of PRECISIONS."""
    # bitsandbytes' CPU kernels are exact in float32; on a GPU everything beside the quantised layers is bf16.
    in_float32 = precision == "float32" or (is_quantized(precision) and DEVICE == "cpu")
    dtype = torch.float32 if in_float32 else torch.bfloat16
    settings: dict[str, Any] = {"dtype": dtype}
    if is_quantized(precision):
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of casts that are meant
        settings["quantization_config"] = quantization(precision, dtype, bnb_4bit_use_double_quant=True)
    model = load_pretrained(AutoModelForCausalLM, path, **settings)
    _without_packing(model)
    return model


def load_finetuned(path: str | Path, precision: str | None, merge: bool) -> Any:
    """The model that finetune.py wrote to the folder `path`, or any other, ready to generate.

    Args:
        path: Folder of an adapter or of a whole model, or a hub id.
        precision: Of the base; None for the one it was tuned in, else that of the device: bf16 on a GPU, float32 on
            a CPU.
        merge: Add the adapter to the weights first.

    Raises:
        InputError: Nothing can be loaded from there, or there is no adapter to merge.
    """
    folder = Path(path)
    run = read_json(folder / RUN_FILE) or {}
    if precision is None:
        precision = str(run.get("base", "bf16" if DEVICE == "cuda" else "float32"))
    adapter = read_json(folder / "adapter_config.json")
    if adapter is None:
        if merge:
            raise InputError(f"--merge needs a folder with an adapter, and {path} holds none")
        model = load_base(path, precision)
    else:
        model = _with_adapter(load_base(adapter["base_model_name_or_path"], precision), folder, merge)
    return (model if is_quantized(precision) else model.to(DEVICE)).eval()


def _without_packing(model: Any) -> None:
    """Keep bitsandbytes from packing 4-bit weights for newer CPUs, which fails but for multiples of 32 outputs."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _with_adapter(base: Any, folder: Path, merge: bool) -> Any:
    try:
        model = PeftModel.from_pretrained(base, folder)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"the adapter in {folder} cannot be loaded: {reason}") from error
    return model.merge_and_unload() if merge else model
