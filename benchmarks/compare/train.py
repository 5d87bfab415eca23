"""One run: build the model, attach the method, train it with transformers' Trainer, measure."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    TrainingArguments,
    set_seed,
)

from benchmarks.environment import describe_environment
from peft_sparsegrad.methods import METHODS

from .recording import RecordingTrainer, StepTimer
from .runs import Record, Run
from .tasks import TASKS, Example

HEADS = ("pooler", "classifier")  # of little use before training: MiniLM comes with a pooler that nobody trained
MAX_LENGTH = 128  # tokens
LAST_STEPS = 20


def execute(run: Run, data: Path) -> Record:
    """Do the run. Returns what was measured.

    Raises:
        InputError: If the task's files under `data` cannot be used.
    """
    started = time.perf_counter()
    model, timer = build_model(run), StepTimer()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(run, model, timer, data, Path(folder))
        trainer.train()
        size = bytes_to_keep(model, Path(folder) / "adapter")
    return {
        "epochs": [{"epoch": epoch, **scores} for epoch, scores in enumerate(trainer.scores, start=1)],
        "last_training_loss": statistics.fmean(trainer.losses[-LAST_STEPS:]),
        **count_trained(model),
        "adapter_bytes": size,
        "steps": len(timer.seconds),
        "seconds_per_step": statistics.median(timer.seconds),
        "seconds": time.perf_counter() - started,
        "data_order": f"{trainer.order:08x}",
        "environment": {
            **describe_environment(trainer.args.device),
            "peft_sparsegrad": version("peft-sparsegrad"),
        },
    }


def build_model(run: Run) -> Any:
    """The model in float32, without dropout (the GradDrop paper trains without), with the method attached."""
    task = TASKS[run.task]
    set_seed(run.seed)  # the next random numbers are those of the task head
    model = AutoModelForSequenceClassification.from_pretrained(
        run.model,
        num_labels=task.num_labels,
        problem_type=task.problem_type,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        dtype="float32",
    )
    heads = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in HEADS]
    method = METHODS[run.method]
    overrides = {"seed": run.seed} if method.draws_masks else {}
    return method.attach(model, None, run.density, modules_to_save=heads, **overrides)


def make_trainer(run: Run, model: Any, timer: StepTimer, data: Path, folder: Path) -> RecordingTrainer:
    """The Trainer with the method's optimizer and callbacks. `folder` is where the Trainer may write."""
    task, method = TASKS[run.task], METHODS[run.method]
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    training = tokenize(tokenizer, task.sample(data, run.train_rows, run.seed))
    dev = tokenize(tokenizer, task.load(data, "dev"))
    dev.sort(key=lambda row: len(row["input_ids"]))  # less padding; the scores do not depend on the order
    trainer = RecordingTrainer(
        task,
        model,
        training_arguments(run, folder),
        train_dataset=training,
        eval_dataset=dev,
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[timer, *(method.make_callbacks() if method.make_callbacks else []), timer.stop],
        optimizers=(method.make_optimizer(model, run.lr) if method.make_optimizer else None, None),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def training_arguments(run: Run, folder: Path) -> TrainingArguments:
    steps = math.ceil(run.train_rows / run.batch_size) * run.epochs
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=run.epochs,
        per_device_train_batch_size=run.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=run.lr,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(0.06 * steps),
        weight_decay=0.01,
        max_grad_norm=1.0,
        seed=run.seed,
        data_seed=run.seed,  # the order must not depend on how many random numbers a method draws
        eval_strategy="epoch",
        save_strategy="no",
        logging_steps=20,
        label_names=["labels"],
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def tokenize(tokenizer: Any, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """One dictionary per example: lists without padding, and the label."""
    sides = zip(*(example.texts for example in examples), strict=True)
    columns = tokenizer(*map(list, sides), truncation=True, max_length=MAX_LENGTH)
    columns["labels"] = [example.label for example in examples]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def count_trained(model: nn.Module) -> dict[str, int]:
    """How many values train in the task head and elsewhere."""
    counts = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        counts[not set(HEADS).isdisjoint(name.split("."))] += parameter.numel() * parameter.requires_grad
    return {"trained_parameters": counts[False], "trained_head_parameters": counts[True]}


def bytes_to_keep(model: nn.Module, folder: Path) -> int:
    """Bytes of the adapter's weights on disk, head included; without an adapter, of the tensors that train."""
    if isinstance(model, PeftModel):
        model.save_pretrained(str(folder))
        return (folder / "adapter_model.safetensors").stat().st_size
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
