"""One run: build the model, attach the method, train it with transformers' Trainer, measure."""

from __future__ import annotations

import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PrinterCallback, TrainingArguments, set_seed

from experiments.costs import StepTimer, bytes_to_keep
from experiments.environment import describe_environment
from experiments.json_files import Record
from experiments.loading import DEVICE
from experiments.methods import METHODS
from experiments.training import rising_steps, training_arguments

from .head import count_trained, head_batches, head_modules, settle_head
from .recording import EvaluateAfter, RecordingTrainer
from .runs import Run
from .tasks import TASKS

LAST_STEPS = 20
# Settled task heads, which are the same for every method and learning rate.
_SETTLED: dict[tuple[Any, ...], dict[str, torch.Tensor]] = {}


def execute(run: Run, data: Path) -> Record:
    """Do the run. Returns what was measured.

    Raises:
        InputError: If the task's files under `data` cannot be used.
    """
    started = time.perf_counter()
    model, timer = build_model(run, data), StepTimer()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(run, model, timer, data, Path(folder))
        trainer.train()
        size = bytes_to_keep(model)
    return {
        "evaluations": trainer.evaluations,
        "last_training_loss": statistics.fmean(trainer.losses[-LAST_STEPS:]),
        **count_trained(model),
        "adapter_bytes": size,
        "steps": len(timer.seconds),
        "seconds_per_step": timer.median,
        "warmup_seconds": timer.warmup_seconds,
        "seconds": time.perf_counter() - started,
        **trainer.memory,
        "data_order": f"{trainer.order:08x}",
        "environment": {
            **describe_environment(trainer.args.device),
            "peft_sparsegrad": version("peft-sparsegrad"),
        },
    }


def build_model(run: Run, data: Path) -> Any:
    """The model with its head settled and the method attached.

    Raises:
        InputError: If the checkpoint or the task's files under `data` cannot be used.
    """
    task, method = TASKS[run.task], METHODS[run.method]
    set_seed(run.seed)  # the next random numbers are those of the task head
    model = task.load_model(run.model).to(DEVICE)
    if run.head_steps:
        key = (data, run.model, run.task, run.seed, run.train_rows, run.batch_size, run.head_steps)
        if key not in _SETTLED:
            tokenizer = AutoTokenizer.from_pretrained(run.model)
            rows = task.divide(data, tokenizer, run.train_rows, run.seed)
            batches = head_batches(*rows, run.head_steps, run.batch_size, run.seed)
            _SETTLED[key] = settle_head(model, batches, task.collator(tokenizer))
        model.load_state_dict(_SETTLED[key], strict=False)
    head = {"modules_to_save": head_modules(model)} if task.has_head else {}
    seed = {"seed": run.seed} if method.takes_seed else {}
    return method.attach(model, None, run.density, **{**head, **seed, **run.overrides})


def make_trainer(run: Run, model: Any, timer: StepTimer, data: Path, folder: Path) -> RecordingTrainer:
    """The Trainer with the method's optimizer and callbacks. `folder` is where the Trainer may write."""
    task, method = TASKS[run.task], METHODS[run.method]
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    training, _ = task.divide(data, tokenizer, run.train_rows, run.seed)
    of_method = method.make_callbacks() if method.make_callbacks else []
    trainer = RecordingTrainer(
        task,
        model,
        _arguments(run, folder),
        train_dataset=training,
        eval_dataset=task.dev(data, tokenizer, run.max_eval_rows),
        data_collator=task.collator(tokenizer),
        callbacks=[timer, *of_method, EvaluateAfter(run.eval_steps), timer.stop],
        optimizers=(method.make_optimizer(model, run.lr) if method.make_optimizer else None, None),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(run: Run, folder: Path) -> TrainingArguments:
    return training_arguments(
        TrainingArguments,
        folder,
        lr=run.lr,
        batch_size=run.batch_size,
        epochs=run.epochs,
        seed=run.seed,
        per_device_eval_batch_size=64,
        warmup_steps=rising_steps(run.steps),
        weight_decay=0.01,
        bf16=run.precision == "bf16",
        eval_strategy="no",  # `EvaluateAfter` says when
        save_strategy="no",
        logging_steps=20,
        label_names=["labels"],
        disable_tqdm=True,
    )
