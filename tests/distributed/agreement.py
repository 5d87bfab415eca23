"""Ranks that differ: in where they are, in their batches, in the layers that they run."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from typing import Any

import torch
from engines import results, share, wrap
from peft import get_peft_model
from tiny import adapted, rows
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler
from transformers import Trainer, TrainingArguments

from peft_sparsegrad import SparseGradCallback, SparseGradConfig, warmup
from peft_sparsegrad.common.training.distributed import agree, numbers_of_ranks, refuse_join

CPU = torch.device("cpu")


def rank() -> int:
    return int(os.environ["RANK"])


def agreement(points: list[str], ok: list[bool]) -> bool:
    return agree(points[rank()], CPU, "do as the others", ok[rank()])


def numbers() -> list[int]:
    return numbers_of_ranks(rank() + 5, CPU)


class RefusesJoin(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        refuse_join("the test")
        return super().forward(x)


def passes_of_ddp(joined: bool | None) -> None:
    """One forward and backward pass; None for no `join` context, False for one that is disabled."""
    model: Any = DistributedDataParallel(RefusesJoin(2, 2))
    if joined is None:
        model(torch.ones(1, 2)).sum().backward()
        return
    with Join([model], enable=joined):
        model(torch.ones(1, 2)).sum().backward()


def shares(count: int = 4) -> list[dict[str, torch.Tensor]]:
    return [share(step) for step in range(count)]


def changed(batches: list[dict[str, torch.Tensor]], **fields: torch.Tensor | None) -> list[dict[str, torch.Tensor]]:
    """Batches with other fields in the third of them on rank 1; None leaves a field out."""
    if rank() == 1:
        batches[2] = {key: value for key, value in {**batches[2], **fields}.items() if value is not None}
    return batches


def passes(model: Any, count: int = 8, factor: float = 1.0) -> Callable[[], None]:
    """A callable that runs dry after some passes; the losses are multiplied by a factor."""
    position = iter(shares(4) * 2)
    left = iter(range(count))

    def run_pass() -> None:
        next(left)
        (model(**next(position)).loss * factor).backward()

    return run_pass


def with_infinite_weight(model: Any) -> list[dict[str, torch.Tensor]]:
    with torch.no_grad():
        model.get_base_model().lm_head.weight[3, 0] = float("inf") if rank() else 0.0
    return shares()


# What rank 1 passes to the warm-up beside what rank 0 passes to it.
UNEVEN: dict[str, Callable[[Any], tuple[Any, int | None]]] = {
    "fewer batches": lambda model: (shares(4 - rank()), None),
    "fewer batches than steps": lambda model: (shares(4 - rank()), 4),
    "batches without labels": lambda model: (
        [{**each, "labels": torch.full_like(each["labels"], -100 if rank() else 5)} for each in shares()],
        None,
    ),
    "a batch without a loss": lambda model: (changed(shares(), labels=None), None),
    "a loss that is not finite": lambda model: (with_infinite_weight(model), None),
    "a gradient that is not finite": lambda model: (passes(model, factor=float("inf") if rank() else 1.0), 4),
    "a callable that runs dry": lambda model: (passes(model, 8 if rank() == 0 else 3), 4),
    "fewer passes": lambda model: (passes(model), 4 - rank()),
}


def uneven(case: str) -> None:
    model = adapted(warmup_steps=4)
    batches, steps = UNEVEN[case](model)
    warmup(model, batches, steps, progress=False)


def trainer_without_labels(folder: str) -> None:
    """None of the rows that rank 1 would draw for the warm-up has labels."""
    arguments = TrainingArguments(folder, max_steps=4, report_to=[], disable_tqdm=True, use_cpu=True)
    data: Any = rows(16)
    for index in DistributedSampler(data, num_replicas=2, rank=1, seed=arguments.seed):
        data[index]["labels"] = [-100] * len(data[index]["labels"])
    Trainer(adapted(warmup_steps=4), arguments, train_dataset=data, callbacks=[SparseGradCallback()]).train()


class Chain(nn.Module):
    """Three layers, of which some may be skipped."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, skipped: str | None) -> torch.Tensor:
        for name in ("first", "second", "third"):
            x = x if name == skipped else getattr(self, name)(x).tanh()
        return x


def chain(layers: list[str], **settings: Any) -> Any:
    return get_peft_model(Chain(), SparseGradConfig(target_modules=layers, density=0.2, **settings))


def layer_skipped(layer: str, in_ddp: bool, **settings: Any) -> None:
    """Rank 1 skips a layer in the first passes of training."""
    model = chain(["first", "second", "third"], warmup_steps=4, **settings)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True) if in_ddp else model
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(5, 16, generator=generator)
        wrapped(x, skipped=layer if rank() else None).square().sum().backward()


def other_layers() -> None:
    """Each rank has adapters on layers of its own, as in a pipeline."""
    model = chain(["third"] if rank() else ["first", "second"])
    warmup(model, lambda: model(torch.ones(2, 16), skipped=None).sum().backward(), 4, progress=False)


class Experts(nn.Module):
    """Two experts, which see the rows whose first entry is above a threshold and the others, if there are any."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        above = x[:, 0] > 0
        return torch.cat([self.first(x[above]), self.second(x[~above])]).tanh()


def expert_without_tokens() -> dict[str, Any]:
    """The second expert gets an empty tensor on rank 1; one process has all rows."""
    config = SparseGradConfig(target_modules=["first", "second"], density=0.2, warmup_steps=4)
    model, steps = get_peft_model(Experts(), config), itertools.cycle(range(4))

    def run_pass() -> None:
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(next(steps)))
        x[1::2, 0] = x[1::2, 0].abs()
        mine = x[rank() :: int(os.environ["WORLD_SIZE"])]
        (model(mine).square().sum() / len(mine)).backward()

    warmup(model, run_pass, 4, progress=False)
    return results(model)


WARM_UPS: dict[str, dict[str, Any]] = {
    **{
        f"{when}, {settings}": {"when": when, **settings}
        for when in ("before", "after", "in training")
        for settings in ({}, {"rank": 24}, {"basis": "svd"})
    },
    "energy": {"when": "after", "support_score": "energy"},
    **{f"NaN in pass {step}": {"when": "in training", "nan_in": step} for step in (0, 1, 3)},  # bases, then supports
}


def warm_up(engine: str, when: str, nan_in: int | None = None, **settings: Any) -> dict[str, Any]:
    """Warm up before or after the model is wrapped, or in training, where one pass may have a NaN on the last rank."""
    model = adapted(warmup_steps=4, density=0.2, slack=5, renewal_steps=0, **settings)  # bases that are not rounded
    if when == "before":
        warmup(model, shares(), progress=False)
    wrapped = wrap(model, engine)
    if when == "after":
        warmup(wrapped, shares(), progress=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    for step in range(0 if when != "in training" else 4 if nan_in is None else 5):
        is_bad = step == nan_in and rank() == int(os.environ["WORLD_SIZE"]) - 1
        (wrapped(**share(step)).loss * (float("nan") if is_bad else 1.0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return results(model)


def warm_ups(engine: str) -> dict[str, dict[str, Any]]:
    return {name: warm_up(engine, **case) for name, case in WARM_UPS.items()}


def joined() -> None:
    """Rank 1 has fewer batches than the warm-up has passes."""
    model: Any = DistributedDataParallel(adapted(warmup_steps=4))
    with Join([model]):
        for step in range(4 - rank()):
            model(**share(step)).loss.backward()


def killed() -> None:
    """Rank 1 is killed before the step after which the supports are renewed."""
    model: Any = DistributedDataParallel(adapted(warmup_steps=0, renewal_steps=3))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(6):
        model(**share(step)).loss.backward()
        if step == 2 and rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        optimizer.zero_grad()
