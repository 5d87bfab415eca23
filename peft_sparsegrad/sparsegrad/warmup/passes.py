"""The passes of an explicit warm-up: batches with labels, and what is wrong with those that cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ...common.training.distributed import agree, numbers_of_ranks
from .batches import check_steps, has_labels, problem_of_batch, problem_of_batches
from .budget import LEAST_PASSES
from .ranks import WAY_OUT

Batches = Iterable[Any] | Callable[[], Any]


def warmup_passes(
    model: nn.Module, batches: Batches, steps: int | None, default_steps: int, device: torch.device
) -> tuple[list[Callable[[], Any]], int]:
    """Return one callable for each pass, and the number of batches without labels that were passed over.

    Raises:
        TypeError: If `steps` is no number, or a batch on any rank is none.
        ValueError: If there are too few batches, or not as many on every rank.
    """
    check_steps(steps)
    if callable(batches) and not isinstance(batches, Iterable):
        return [_until_dry(batches)] * (steps or default_steps), 0
    kept, without_labels, problem = [], 0, problem_of_batches(batches)
    for index, batch in enumerate(batches if problem is None else ()):
        problem = problem_of_batch(batch, index)
        if problem is not None:
            break
        if has_labels(batch):
            kept.append(batch)
        else:
            without_labels += 1
        if len(kept) == (steps or default_steps):
            break
    counts = numbers_of_ranks(-1 if problem else len(kept), device)
    if min(counts) < 0:
        raise TypeError(problem or f"rank {counts.index(-1)} has something else than batches for the warm-up")
    if len(set(counts)) > 1:
        raise ValueError(
            f"the ranks have {counts} batches with labels for the warm-up: give every rank the same number of them"
        )
    if len(kept) < (steps or LEAST_PASSES):
        others = f", and {without_labels} more have no label but -100" if without_labels else ""
        raise ValueError(
            f"the batches ran dry after {len(kept)} of {steps or default_steps}{others}: pass more of them, or fewer "
            "`steps`, of which the warm-up needs 2"
        )
    passes = [lambda index=index, batch=batch: _backward(model, batch, index) for index, batch in enumerate(kept)]
    return passes, without_labels


def _until_dry(run_pass: Callable[[], Any]) -> Callable[[], Any]:
    def checked() -> None:
        try:
            run_pass()
        except StopIteration as error:
            # On this rank alone: the others may be in a collective operation of the model's wrapper already, and end
            # when this process does.
            raise ValueError(
                "the batches ran dry: the warm-up calls its callable once for each of its `steps`, and again where "
                "there was no gradient"
            ) from error

    return checked


def _backward(model: nn.Module, batch: Any, index: int) -> None:
    device = next(model.parameters()).device
    on_device = {key: v.to(device) if isinstance(v, torch.Tensor) else v for key, v in batch.items()}
    finite_loss(batch_loss(model, on_device, index), index).backward()


def finite_loss(loss: torch.Tensor, index: int) -> torch.Tensor:
    """Return the loss of the warm-up's batch `index`.

    Raises:
        ValueError: If the loss is NaN or Inf on any rank.
    """
    if not agree(f"the loss of warm-up batch {index}", loss.device, WAY_OUT, ok=bool(torch.isfinite(loss))):
        elsewhere = ", and NaN or Inf on another rank" if torch.isfinite(loss) else ""
        raise ValueError(f"warm-up batch {index} gave a loss of {loss.item()}{elsewhere}: check its inputs and labels")
    return loss


def batch_loss(model: nn.Module, batch: dict[str, Any], index: int) -> torch.Tensor:
    """Return the loss that the model computes for the batch `index`.

    Raises:
        ValueError: If it computes none on any rank.
    """
    output = model(**batch)
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    device = next(model.parameters()).device
    if not agree(f"the output for warm-up batch {index}", device, WAY_OUT, ok=loss is not None):
        where = "" if loss is None else " on another rank"
        raise ValueError(
            f"warm-up batch {index} gave no loss{where}: put `labels` into the batch, it has {sorted(batch)}"
        )
    return loss  # pyright: ignore[reportReturnType]
