"""Train a tiny model under DeepSpeed ZeRO, as `engines.py` does under torch's engines."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(DS_ACCELERATOR="cpu", DS_SKIP_CUDA_CHECK="1")

import deepspeed
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from engines import EPOCHS, LEARNING_RATE, METHODS, STEPS, make, optimizer_for, results, share, train_by_torch  # noqa: F401
from tiny import rows
from transformers import Trainer, TrainingArguments

from peft_sparsegrad import GradDrop, GradDropCallback, warmup

sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # it would compile an extension


def config(engine: str, **settings: Any) -> dict[str, Any]:
    """The configuration of ZeRO of the stage that ends the engine's name."""
    return {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": int(engine[-1]), "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 0.0,  # the default is 1
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1000,
        **({"bf16": {"enabled": True}} if "bf16" in engine else {}),
        **settings,
    }


def train_by_deepspeed(engine: str, method: str) -> dict[str, Any]:
    """Train by DeepSpeed's loop with ZeRO of the stage that ends the engine's name."""
    settings = METHODS[method]
    model, masks = make(method)
    micro_batches = 2 if "accumulation" in engine else 1
    deepspeed.init_distributed(dist_backend="gloo")
    wrapped, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer_for(model, method),
        config=config(engine, gradient_accumulation_steps=micro_batches),
    )
    if settings.get("warm_up") == "after":
        warmup(wrapped, [share(step) for step in range(4)], 4, progress=False)
    if settings.get("masks_after"):
        masks = GradDrop(wrapped, settings["masks"]())
    for step in range(STEPS):
        if "Epoch" in method and step % (STEPS // EPOCHS) == 0:
            masks.set_epoch(step * EPOCHS // STEPS)
        for micro_batch in range(micro_batches):
            wrapped.backward(wrapped(**share(step, micro_batch)).loss)
            wrapped.step()
    return whole_results(model)


def whole_results(model: Any) -> dict[str, Any]:
    with GatheredParameters([parameter for parameter in model.parameters() if parameter.requires_grad]):
        return results(model)


def train_by_trainer(engine: str, method: str, folder: str) -> dict[str, Any]:
    """Train by transformers' Trainer, with DeepSpeed on several ranks; go on with a run that is there half-way."""
    world = int(os.environ["WORLD_SIZE"])
    arguments = TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=8 // world,
        learning_rate=LEARNING_RATE,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
        max_grad_norm=0.0,
        save_steps=STEPS // 2,
        deepspeed=config(engine) if world > 1 else None,
    )
    model, _ = make(method)
    callbacks = [GradDropCallback()] if "GradDrop" in method else []
    trainer = Trainer(model, arguments, train_dataset=rows(64), callbacks=callbacks)
    half = Path(folder) / f"checkpoint-{STEPS // 2}"
    trainer.train(resume_from_checkpoint=str(half) if half.exists() else None)
    trainer.save_model(str(Path(folder) / "saved"))
    return whole_results(model)
