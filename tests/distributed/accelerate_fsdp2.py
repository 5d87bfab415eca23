"""Train and save under accelerate's FSDP2."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from engines import METHODS, STEPS, optimizer_for, results, share
from peft import get_peft_model
from transformers import LlamaForCausalLM

from peft_sparsegrad import SparseGradConfig, warmup


def accelerator(efficient: bool) -> Accelerator:
    """accelerate under FSDP2, which it does not choose by itself on a CPU; without ranks plain accelerate."""
    if not dist.is_initialized():
        return Accelerator(cpu=True)
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=efficient,
        state_dict_type="FULL_STATE_DICT",
    )
    made = Accelerator(fsdp_plugin=plugin, cpu=True)
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    return made


def prepared(method: str, base: str, efficient: bool) -> tuple[Accelerator, Any, Any]:
    """accelerate with model and optimizer, warmed up when the model is sharded."""
    made = accelerator(efficient)
    torch.manual_seed(0)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), METHODS[method]["config"]())
    model, optimizer = made.prepare(model.train(), optimizer_for(model, method))
    if METHODS[method].get("warm_up") == "before":
        warmup(model, [share(step) for step in range(4)], 4, progress=False)
    return made, model, optimizer


def steps(made: Accelerator, model: Any, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        made.backward(model(**share(step)).loss)
        optimizer.step()
        optimizer.zero_grad()


def train(method: str, base: str, efficient: bool, folder: str) -> dict[str, Any]:
    """Train and save as the Trainer does."""
    made, model, optimizer = prepared(method, base, efficient)
    steps(made, model, optimizer, 0, STEPS)
    state = made.get_state_dict(model)
    unwrapped: Any = made.unwrap_model(model)
    if made.is_main_process:
        unwrapped.save_pretrained(folder, state_dict=state)
    return results(unwrapped)


def refused(base: str, basis: Any) -> None:
    """Ask for the weights before the model is prepared."""
    accelerator(efficient=True)
    config = SparseGradConfig(basis=basis, task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    warmup(model, [share(0)], progress=False)
