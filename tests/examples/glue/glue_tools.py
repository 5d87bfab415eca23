"""A tiny encoder and tiny data for the GLUE example."""

from __future__ import annotations

import csv
import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from fresh import Program
from tiny import VOCAB, bert, tokenizer

from examples.glue.runs import Run

MEASURED = ("seconds", "costs", "environment")
SMALL = ["--epochs", "3", "--patience", "3", "--warmup-steps", "2", "--head-steps", "2", "--density", "0.05"]


def save_model(folder: Path, **settings) -> Path:
    """A BERT with dropout and without a head, as checkpoints come, and its tokenizer."""
    bert(**settings).bert.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_data(folder: Path, rows: int = 40) -> Path:
    """CoLA and STS-B without headers: of half of the vocabulary, and how much two sentences share, is the label."""
    rng = random.Random(0)
    for name in ("cola", "stsb"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for split, count in {"train": rows, "dev": 24}.items():
        with (folder / "cola" / f"cola_{split}.tsv").open("w") as file:
            for i in range(count):
                low = 3 if i % 2 else VOCAB // 2
                file.write(f"gj04\t{i % 2}\t\t{sentence(rng, low, low + VOCAB // 2 - 3)}\n")
        with (folder / "stsb" / f"stsb_{split}.csv").open("w", newline="") as file:
            for i in range(count):
                text = sentence(rng)
                csv.writer(file).writerow((text, text if i % 2 else sentence(rng), 4.5 if i % 2 else 0.5))
    return folder


def sentence(rng: random.Random, low: int = 3, high: int = VOCAB) -> str:
    return " ".join(f"t{rng.randrange(low, high)}" for _ in range(rng.randrange(3, 7)))


def start(module: str, *arguments: object) -> Program:
    """What a user's command does."""
    return Program("-m", f"examples.glue.{module}", *arguments)


def kill_when(program: Program, happened: Callable[[], object]) -> None:
    """Kill a program once something has happened, for which it is asked every few milliseconds."""
    deadline = time.monotonic() + 200
    while not happened():
        assert program.returncode is None, program.stderr
        assert time.monotonic() < deadline
        time.sleep(0.005)
    program.kill()
    assert program.returncode == -signal.SIGKILL


def make_run(**settings) -> Run:
    values = {
        "model": "m", "data": "d", "task": "cola", "method": "lora", "seed": 0, "lr": 1e-3, "adapter_lr": None,
        "settings": "{}", "batch_size": 8, "density": 0.05, "num_values": None, "rest": "frozen",
        "target_modules": None, "epochs": 3, "patience": 3, "train_rows": None, "dev_rows": None, "max_length": 32,
        "warmup_steps": 2, "head_steps": 2, "precision": "float32", "weight_decay": 0.0, "lr_warmup": 0.06,
    }  # fmt: skip
    return Run(**{**values, **settings})


def results_in(path: Path) -> list[dict]:
    """The lines of a file of results without the times."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in MEASURED} for record in records]
