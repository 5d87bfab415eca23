"""One method on one model: seconds, bytes and values of its training step."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import peft_sparsegrad
from experiments.costs import bytes_to_keep
from experiments.methods import METHODS, targeted
from peft_sparsegrad import SparseGradConfig
from peft_sparsegrad.common.targets.modules import exact_targets

from ..contenders import LEARNING_RATE, Contender
from ..models import build_model, make_batch
from ..step import measure_memory
from ..timing import Stopwatch
from .settings import CONTENDERS, FROZEN, Setting

DENSITY = 0.01
LARGEST_FILE = 100_000_000
"""Trained values above which no file is written: that would take longer than all measurements."""

Row = dict[str, Any]
Batch = dict[str, torch.Tensor]


class AutocastContender(Contender):
    """A contender whose forward pass runs under bfloat16 autocast."""

    def forward(self, batch: Batch) -> torch.Tensor:
        with torch.autocast(batch["input_ids"].device.type, torch.bfloat16):
            return super().forward(batch)


def measure_contender(name: str, setting: Setting, device: torch.device, rounds: int) -> Iterator[Row]:
    """Yield the row of each of the setting's batches for one contender.

    Args:
        name: Key of `CONTENDERS`.
        setting: Model and batches.
        device: Where it runs.
        rounds: Number of timed steps.
    """
    batches = {tokens: make_batch(setting.of_tokens(tokens), device, padded=False) for tokens in setting.tokens}
    first = next(iter(batches.values()))
    build(FROZEN, setting, device).step(first)  # a process's first step loads the GPU's kernels, whatever trains
    contender = build(name, setting, device)
    warmup = warm_up(contender, first)
    file_bytes = None
    for tokens, batch in batches.items():
        memory = measure_memory(contender, batch)
        times = step_milliseconds(lambda batch=batch: contender.step(batch), device, rounds)
        if file_bytes is None and contender.trained <= LARGEST_FILE:
            file_bytes = bytes_to_keep(contender.model)
        median = statistics.median(times)
        steps = None if warmup is None else 1000 * warmup / median
        cost = {"trained": contender.trained, "file_bytes": file_bytes, "warmup_seconds": warmup}
        yield {"tokens": tokens, "median_ms": median, "warmup_in_steps": steps, **cost, **memory, "ms": times}


def build(name: str, setting: Setting, device: torch.device) -> Contender:
    """Return a contender on a model of its own, not yet warmed up."""
    model = build_model(setting.shape, device, setting.weights)
    method, settings = CONTENDERS[name]
    if method == FROZEN:
        return AutocastContender(name, model.requires_grad_(False), None)
    targets = None
    if method == "graddrop":  # which by itself trains everything in the blocks
        targets = exact_targets(model, [target for target, _ in targeted(model, None)])
    model = METHODS[method].attach(model, targets, DENSITY, **settings)
    make_optimizer = METHODS[method].make_optimizer or _adamw
    return AutocastContender(name, model, make_optimizer(model, LEARNING_RATE))


def _adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Return the Trainer's optimizer: fused on a GPU."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, fused=trained[0].is_cuda)


def warm_up(contender: Contender, batch: Batch) -> float | None:
    """Return the seconds of a method's warm-up with its own number of steps, None if it has none."""
    config = getattr(contender.model, "peft_config", {}).get("default")
    if not isinstance(config, SparseGradConfig) or config.warmup_steps == 0:
        return None
    forward = contender.forward
    with Stopwatch(batch["input_ids"].device) as watch:
        peft_sparsegrad.warmup(contender.model, lambda: forward(batch).backward(), progress=False)
    return watch.seconds


def step_milliseconds(step: Callable[[], object], device: torch.device, rounds: int) -> list[float]:
    """Return the times of `rounds` steps, one after the other without a wait; two more come before them.

    On a GPU these are times between events on its stream.
    """
    for _ in range(2):
        step()
    marks = [_mark(device)]
    for _ in range(rounds):
        step()
        marks.append(_mark(device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return [first.elapsed_time(second) for first, second in itertools.pairwise(marks)]
    return [1000 * (second - first) for first, second in itertools.pairwise(marks)]


def _mark(device: torch.device) -> Any:
    """Return an event of the device's stream that is recorded now, or the time."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
