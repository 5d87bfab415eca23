"""Train a tiny model under each engine, and measure what each rank holds before an optimizer's step."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from engines import optimizer_for, share, wrap
from peft import LoraConfig, get_peft_model
from tiny import llama

from benchmarks.rank_memory import METHODS, count
from experiments.costs import StepMemory
from experiments.memory import storages
from peft_sparsegrad import GradDrop
from peft_sparsegrad.common.training.pieces import local_part
from peft_sparsegrad.graddrop.layer import GradDropLayer
from peft_sparsegrad.sparsegrad.layer import layer_adapters

if importlib.util.find_spec("deepspeed"):
    from deepspeed_engine import deepspeed

# Sizes that two ranks cannot share without padding.
UNEVEN = {"hidden_size": 33, "intermediate_size": 65, "num_attention_heads": 3, "head_dim": 8, "num_hidden_layers": 2}


def measure(engine: str) -> dict[str, dict[str, dict[str, int]]]:
    """Return what is held between the second backward pass and its step, and what is counted: bytes of each kind."""
    train = train_by_deepspeed if engine.startswith("ZeRO") else train_by_torch
    held, counted = {}, {}
    for method in METHODS:
        model = make(method)
        counted[method] = count(model, engine, torch.distributed.get_world_size()).bytes()
        held[method] = train(model, method, engine)
    return {"held": held, "counted": counted}


def step_memory() -> dict[str, int | None]:
    """What `StepMemory` finds in the second step under FSDP2, and the bytes of two moments of this rank's values."""
    torch.manual_seed(0)
    model = wrap(get_peft_model(llama(), LoraConfig(target_modules=["up_proj"])), "FSDP2")
    optimizer, memory = optimizer_for(model, "LoRA"), StepMemory()
    for _ in range(2):
        memory.on_step_begin(model=model, optimizer=optimizer)
        model(**share(0)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        memory.on_step_end(optimizer=optimizer)
    moments = 2 * 4 * sum(local_part(parameter).numel() for parameter in trained(model))
    return {"peak": memory.peak_memory, "optimizer": memory.optimizer_bytes, "moments": moments}


def make(method: str) -> Any:
    """A model in bfloat16 with an adapter that needs no warm-up; of two epochs the first is announced."""
    torch.manual_seed(0)
    config = METHODS[method]()
    if "SparseGrad" in method:
        config.warmup_steps, config.density = 0, 0.2
    model = get_peft_model(llama(**UNEVEN).bfloat16(), config)
    if "Epoch" in method:
        GradDrop(model, num_epochs=2).set_epoch(0)
    return model


def train_by_torch(model: Any, method: str, engine: str) -> dict[str, int]:
    wrapped = wrap(model, engine.removeprefix("one process, "))
    optimizer = optimizer_of(model, method)
    wrapped(**share(0)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    wrapped(**share(0)).loss.backward()
    parameters = trained(model)
    gradients = [local_part(parameter.grad) for parameter in parameters]
    return sizes(model, optimizer, [local_part(parameter) for parameter in parameters], gradients, [])


def train_by_deepspeed(model: Any, method: str, engine: str) -> dict[str, int]:
    deepspeed.init_distributed(dist_backend="gloo")
    stage, optimizer = int(engine[-1]), optimizer_of(model, method)
    wrapped, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": 4,
            "bf16": {"enabled": True},
            "zero_optimization": {
                "stage": stage,
                "stage3_param_persistence_threshold": 0,
                "reduce_bucket_size": 10_000,
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1000,
        },
    )
    wrapped.backward(wrapped(**share(0)).loss)
    wrapped.step()
    wrapped.backward(wrapped(**share(0)).loss)
    zero = wrapped.optimizer
    copies = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    gradients = [gradient for group in zero.averaged_gradients.values() for gradient in group]
    return sizes(model, optimizer, [local_part(parameter) for parameter in trained(model)], gradients, copies)


def optimizer_of(model: Any, method: str) -> torch.optim.Optimizer:
    return optimizer_for(model, "dynamic" if method.endswith("dynamic") else method)


def sizes(model: Any, optimizer: torch.optim.Optimizer, values: Any, gradients: Any, copies: Any) -> dict[str, int]:
    adapters = layer_adapters(model, "default")
    cores = [adapter.training_state.core_gradient for adapter in adapters]
    bases = [buffer for adapter in adapters for buffer in adapter.basis.buffers()]
    own = {"bases": bases, "supports": list(supports(model))}
    others = {id(tensor) for tensors in own.values() for tensor in tensors}
    base = [local_part(parameter) for parameter in model.parameters() if not parameter.requires_grad]
    held = {
        "base": base + [buffer for buffer in model.buffers() if id(buffer) not in others],
        **own,
        "sums": [core.total for core in cores if core.total is not None],
        "pending": [core.pending for core in cores if core.pending is not None],
        "values": values,
        "copies": copies,
        "state": [local_part(each) for state in optimizer.state.values() for each in state.values()],
    }
    found = {kind: sum(storages(tensors).values()) for kind, tensors in held.items()}
    # Of slices, as DeepSpeed's first and last ones of a rank may be parts of a tensor that is about to go.
    return {**found, "gradients": sum(gradient.nbytes for gradient in gradients)}


def supports(model: Any) -> Iterator[torch.Tensor]:
    for adapter in layer_adapters(model, "default"):
        yield from adapter.buffers()
        if adapter.indices is not None:
            yield adapter.indices
    if any(isinstance(module, GradDropLayer) for module in model.modules()):
        yield from (each for each in gc.get_objects() if isinstance(each, torch.Tensor) and each.dtype == torch.int8)


def trained(model: Any) -> list[Any]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
