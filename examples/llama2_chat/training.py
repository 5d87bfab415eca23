"""TRL's SFTTrainer for a model that a method is already on, and what a run measures."""

from __future__ import annotations

import argparse
import importlib.metadata
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from experiments.attachment import make_callbacks, make_optimizer
from experiments.costs import StepMemory, StepTimer
from experiments.loading import DEVICE
from experiments.training import training_arguments

from .load_model import is_quantized
from .run_folder import MarkCompleteCheckpoints, last_checkpoint, seconds_before

PACKAGES = ("accelerate", "bitsandbytes", "peft", "peft-sparsegrad", "torch", "transformers", "trl")
Rows = list[dict[str, list[int]]]


def make_sft_config(args: argparse.Namespace) -> SFTConfig:
    """The Trainer's arguments. Making them joins the processes that `accelerate launch` started."""
    return training_arguments(
        SFTConfig,
        args.out,
        lr=args.lr,
        batch_size=args.batch_size,
        epochs=args.epochs,
        seed=args.seed,
        max_steps=args.steps or -1,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulate,
        gradient_checkpointing=args.gradient_checkpointing,
        lr_scheduler_type="cosine",
        # On a CPU the quantised bases compute in float32; see load_base.
        bf16=args.base == "bf16" or (is_quantized(args.base) and DEVICE == "cuda"),
        save_steps=args.save_steps,
        save_total_limit=2,  # while one is being written, the one before must stay
        logging_steps=args.logging_steps,
        report_to=args.report_to,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},  # the rows are tokens and labels already
    )


def make_trainer(
    model: Any, tokenizer: Any, rows: Rows, validation: Rows, config: SFTConfig, args: argparse.Namespace
) -> SFTTrainer:
    """The Trainer, with the method's callbacks and optimizer."""
    train_in_float32(model)
    # Not by `evaluate` before `train`: that prepares the model for inference, and DDP would not synchronise gradients.
    checkpoint = last_checkpoint(args.out)
    config.eval_on_start, before = checkpoint is None, seconds_before(checkpoint)
    timer, of_method = StepTimer(), make_callbacks(args.method, model, args.warmup_steps)
    trainer = SFTTrainer(
        model,
        config,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(validation),
        processing_class=tokenizer,
        callbacks=[timer, *of_method, StepMemory(), timer.stop, MarkCompleteCheckpoints(before)],
        optimizers=(make_optimizer(args.method, model, args.lr), None),
    )
    train_in_float32(model)  # TRL has cast them to bf16 where the base is quantised
    return trainer


def train_in_float32(model: nn.Module) -> None:
    """Hold what trains in float32: bf16 has 8 bits for a value, and swallows most updates of a small learning rate."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def validation_loss(trainer: SFTTrainer) -> float:
    """The mean over the validation batches of the mean cross-entropy (nats) of a batch's answer tokens."""
    return trainer.evaluate()["eval_loss"]


def first_validation_loss(trainer: SFTTrainer) -> float:
    """The same before the first step, from the log, which checkpoints keep."""
    return next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)


def costs_of_steps(trainer: SFTTrainer) -> dict[str, float | int | None]:
    """The median seconds of a step, and the bytes of one; None where this process has taken too few steps."""
    found = {type(callback): callback for callback in trainer.callback_handler.callbacks}
    timer, memory = found[StepTimer], found[StepMemory]
    return {
        "seconds_per_step": timer.median if timer.seconds else None,
        "peak_step_bytes": memory.peak_memory,
        "optimizer_bytes": memory.optimizer_bytes,
    }


def peak_memory() -> dict[str, int]:
    """Bytes at the peak of this process: allocated on its GPU, or else resident."""
    if DEVICE == "cuda":
        return {"peak_gpu_bytes": torch.cuda.max_memory_allocated()}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def saved_bytes(folder: Path) -> int:
    """Size of the saved adapter, or of the saved model."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def versions() -> dict[str, str]:
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # bitsandbytes is optional
            continue
    return installed
