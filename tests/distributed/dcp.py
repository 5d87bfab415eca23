"""Save a run with torch's distributed checkpoints, and go on with it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from engines import METHODS, STEPS, optimizer_for, results, share, wrap
from peft import get_peft_model
from tiny import llama
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from peft_sparsegrad import warmup

HALF = STEPS // 2
OWN = ("lora_", "sparsegrad_", "graddrop_")


def prepared(method: str, warm_up: bool) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = get_peft_model(llama(), METHODS[method]["config"]())
    if warm_up and METHODS[method].get("warm_up") == "before":
        warmup(model, [share(step) for step in range(4)], 4, progress=False)
    wrapped = wrap(model, "FSDP2" if dist.is_initialized() else "one process")
    return wrapped, optimizer_for(wrapped, method)


def steps(model: Any, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        model(**share(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def states(model: Any, optimizer: Any) -> dict[str, Any]:
    """The states of the adapter and of the optimizer."""
    own = {name: each for name, each in get_model_state_dict(model).items() if any(key in name for key in OWN)}
    return {"model": own, "optimizer": get_optimizer_state_dict(model, optimizer)}


def save(method: str, folder: str) -> dict[str, Any]:
    """Train and save half-way; return the end."""
    model, optimizer = prepared(method, warm_up=True)
    steps(model, optimizer, 0, HALF)
    dcp.save(states(model, optimizer), checkpoint_id=folder)
    steps(model, optimizer, HALF, STEPS)
    return results(model)


def resume(method: str, folder: str) -> dict[str, Any]:
    """Go on from half-way; return the end."""
    model, optimizer = prepared(method, warm_up=False)
    state = states(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"], options=StateDictOptions(strict=False))
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    steps(model, optimizer, HALF, STEPS)
    return results(model)
