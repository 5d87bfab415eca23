"""One run: a copy of the model, the method attached, warmed up and trained, and what was measured."""

from __future__ import annotations

import copy
import gc
import math
import statistics
import time
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import peft_sparsegrad
from benchmarks.compare.head import count_trained, in_head, train_head_apart
from experiments.costs import bytes_to_keep
from experiments.environment import describe_environment
from experiments.json_files import Record
from experiments.training import rising_steps

from .methods import METHODS, Method
from .precision import computing, hold
from .runs import Run
from .task import Batch, FrontierTask, on_device
from .tasks import load_task

LAST_STEPS = 20
MAX_NORM = 1.0
HEAD_SPREAD = 0.02  # of a new head's weights, as in BERT


class Workplace:
    """What a process keeps between its runs: tasks, the models' weights and settled task heads.

    Args:
        model: Folder of the checkpoint.
        data: Folder of the data.
        device: Where to train.
        precision: One of `PRECISIONS`.
    """

    def __init__(self, model: Path, data: Path, device: torch.device, precision: str) -> None:
        self.model, self.data, self.device, self.precision = model, data, device, precision
        self.task = cache(self._load_task)
        self.head = cache(self._settled_head)
        self.before = cache(self._scores_before)
        self.batches = cache(self._batches)

    def fresh_model(self, task: str, seed: int) -> Any:
        """Return a copy of the checkpoint on the device, with the seed's settled task head."""
        model = copy.deepcopy(self.task(task).base)
        model.load_state_dict(self.head(task, seed), strict=False)
        return model.to(self.device)

    def computing(self) -> Any:
        """Return the context of forward passes."""
        return computing(self.precision, self.device)

    def scores(self, task: str, model: Any) -> dict[str, Any]:
        """Score a model as the task does."""
        model.eval()
        with torch.no_grad(), self.computing():
            return self.task(task).scores(model)

    def _load_task(self, name: str) -> FrontierTask:
        task = load_task(name, self.model, self.data)
        task.base = hold(task.base, self.precision)
        return task

    def _settled_head(self, name: str, seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        model = copy.deepcopy(self.task(name).base)
        for parameter in (p for where, p in model.named_parameters() if in_head(where)):
            nn.init.normal_(parameter, 0.0, HEAD_SPREAD) if parameter.ndim > 1 else nn.init.zeros_(parameter)
        with self.computing():
            self.task(name).settle(model.to(self.device).train(), seed)
        return {where: p.detach().cpu().clone() for where, p in model.named_parameters() if in_head(where)}

    def _scores_before(self, name: str, seed: int) -> dict[str, Any]:
        return self.scores(name, self.fresh_model(name, seed))

    def _batches(self, name: str, batch_size: int, steps: int, seed: int) -> list[Batch]:
        return self.task(name).batches(batch_size, steps, seed)


def execute(place: Workplace, run: Run) -> Record:
    """Do the run. Returns what was measured."""
    started, method, task = time.perf_counter(), METHODS[run.method], place.task(run.task)
    before = place.before(run.task, run.seed)
    model = attach(place, run)
    _reset_peak(place.device)
    batches = [on_device(each, place.device) for each in place.batches(run.task, run.batch_size, run.steps, run.seed)]
    passes = warm_up(place, method, task, model, batches)
    worth = warmup_worth(model, passes)
    seconds, losses = train(place, method, task, model, batches[passes:], run.lr)
    peak = torch.cuda.max_memory_allocated(place.device) if place.device.type == "cuda" else None
    after = place.scores(run.task, model)
    return {
        **{name: after[name] for name in ("score", "search_score")},
        "after": after,
        "before": before,
        "training_loss": statistics.fmean(losses[-LAST_STEPS:]) if losses else None,
        "passes": run.steps,
        "warmup_passes": passes,
        "warmup_worth": worth,
        "seconds_per_step": seconds / len(losses) if losses else None,
        "peak_memory": peak,
        **count_trained(model),
        "adapter_bytes": bytes_to_keep(model),
        "seconds": time.perf_counter() - started,
        "place": method.place,
        "settings": method.settings,
        "environment": {
            **describe_environment(place.device),
            "precision": run.precision,
            "peft_sparsegrad": peft_sparsegrad.__version__,
        },
    }


def attach(place: Workplace, run: Run) -> Any:
    """Return a fresh model with the run's method, in training mode."""
    model = place.fresh_model(run.task, run.seed)
    torch.manual_seed(run.seed)  # the next random numbers are the adapter's
    return METHODS[run.method].attach(model, run.seed).train()


def warmup_worth(model: Any, passes: int) -> float | None:
    """Return how many training steps a warm-up was worth; None if it had no passes."""
    report = peft_sparsegrad.warmup_report(model) if passes else None
    return report and report.steps_worth


def warm_up(place: Workplace, method: Method, task: FrontierTask, model: Any, batches: list[Batch]) -> int:
    """Run the method's warm-up, if it has one, on the first of these batches. Returns its backward passes.

    Raises:
        ValueError: If it takes as many passes as the run has.
    """
    if not method.needs_warmup:
        return 0
    passes, waiting = 0, cycle(batches)

    def run_pass() -> None:
        nonlocal passes
        passes += 1
        with place.computing():
            loss = task.loss(model, next(waiting))
        loss.backward()

    peft_sparsegrad.warmup(model, run_pass, progress=False)
    if passes >= len(batches):
        raise ValueError(f"the warm-up of {method.name} takes {passes} passes, and the run has {len(batches)} in all")
    return passes


def train(
    place: Workplace, method: Method, task: FrontierTask, model: Any, batches: list[Batch], lr: float
) -> tuple[float, list[float]]:
    """Take a step for each batch, if anything trains. Returns the seconds of all of them, and the batches' losses."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        return 0.0, []
    optimizer = make_optimizer(method, model, lr)
    schedule = LambdaLR(optimizer, lambda step: rate_at(step, len(batches)))
    losses: list[torch.Tensor] = []
    synchronize(place.device)
    started = time.perf_counter()
    for batch in batches:
        take_step(place, task, model, optimizer, trained, batch, losses)
        schedule.step()
    synchronize(place.device)
    return time.perf_counter() - started, [loss.item() for loss in losses]


def make_optimizer(method: Method, model: Any, lr: float) -> torch.optim.Optimizer:
    """Return the method's optimizer; a task head has a learning rate of its own, the same for every method."""
    optimizer = method.optimizer(model, lr)
    train_head_apart(optimizer, model)
    return optimizer


def take_step(
    place: Workplace,
    task: FrontierTask,
    model: Any,
    optimizer: torch.optim.Optimizer,
    trained: list[nn.Parameter],
    batch: Batch,
    losses: list[torch.Tensor],
) -> None:
    """Forward and backward pass, clipping, optimizer step; adds the loss, which may still be computed, to `losses`."""
    with place.computing():
        loss = task.loss(model, batch)
    loss.backward()
    nn.utils.clip_grad_norm_(trained, MAX_NORM)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.detach())


def rate_at(step: int, steps: int) -> float:
    """Return the share of the peak learning rate: it rises over the first 6%, and falls along a cosine to 0."""
    rising = rising_steps(steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tidy(device: torch.device) -> None:
    """Free the memory of the run before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
