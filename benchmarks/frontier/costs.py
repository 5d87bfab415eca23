"""Step time and memory of each method, alone on the machine, on the task's largest batch."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch

import peft_sparsegrad
from benchmarks.compare.head import count_trained
from experiments.costs import bytes_to_keep, step_memory
from experiments.environment import describe_environment
from experiments.json_files import Record
from experiments.results import append_json_line, read_json_lines

from .methods import METHODS
from .runs import Run
from .task import on_device
from .train import Workplace, attach, make_optimizer, synchronize, take_step, tidy, warm_up, warmup_worth

FIRST = 4  # steps before those that are timed: the optimizer makes its state, kernels are chosen
RATE = 1e-4
KEY = ("model", "task", "method", "batch_size", "precision")


def measured_methods(path: Path) -> list[Record]:
    """Return the lines of a file of costs that need not exist yet."""
    return read_json_lines(path) if path.exists() else []


def measure_missing(place: Workplace, runs: list[Run], path: Path, rounds: int, deadline: float | None) -> None:
    """Add a line for each run's method that the file lacks, until the deadline on the clock of `time.monotonic`."""
    done = {tuple(line[name] for name in KEY) for line in measured_methods(path)}
    path.parent.mkdir(parents=True, exist_ok=True)
    for run in runs:
        key = {name: getattr(run, name) for name in KEY}
        if tuple(key.values()) in done:
            continue
        if deadline is not None and time.monotonic() > deadline:
            return
        measured = measure(place, run, rounds)
        tidy(place.device)
        if measured:
            append_json_line(path, {**key, **measured})
            print(f"{run.task}, {run.method}: {1000 * measured['seconds_per_step']:.1f} ms per step", flush=True)


def measure(place: Workplace, run: Run, rounds: int) -> Record:
    """Return a method's seconds per step, the steps that its warm-up was worth, bytes, and trained values.

    The frozen model without a task head takes no step, and has no costs. Memory is counted in one more step, as
    `experiments.costs.step_memory` does: the device's allocations on a GPU, the allocator's trace on a CPU.
    """
    method, task = METHODS[run.method], place.task(run.task)
    model = attach(place, run)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        return {}
    batch = on_device(task.longest_batch(run.batch_size), place.device)
    passes = warm_up(place, method, task, model, [batch] * run.steps)
    worth = warmup_worth(model, passes)
    optimizer = make_optimizer(method, model, RATE)
    seconds = []
    for _ in range(FIRST + rounds):
        synchronize(place.device)
        started = time.perf_counter()
        take_step(place, task, model, optimizer, trained, batch, [])
        synchronize(place.device)
        seconds.append(time.perf_counter() - started)

    def forward() -> torch.Tensor:
        with place.computing():
            return task.loss(model, batch)

    return {
        "seconds_per_step": statistics.median(seconds[FIRST:]),
        "seconds": seconds[FIRST:],
        "warmup_worth": worth,
        **step_memory(model, optimizer, forward),
        **count_trained(model),
        "adapter_bytes": bytes_to_keep(model),
        "tokens": batch["input_ids"].numel(),
        "environment": {
            **describe_environment(place.device),
            "precision": run.precision,
            "peft_sparsegrad": peft_sparsegrad.__version__,
        },
    }
