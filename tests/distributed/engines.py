"""Train a tiny model under each engine, on fixed global batches that are split over the ranks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from mixtures import EXPERTS, mixtral
from peft import LoraConfig, get_peft_model
from tiny import batch, llama
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

from peft_sparsegrad import (
    GradDrop,
    GradDropConfig,
    SparseGradAdam,
    SparseGradConfig,
    create_sparsegrad_optimizer,
    warmup,
)
from peft_sparsegrad.sparsegrad.layer import SparseGradLayer

STEPS, EPOCHS, RENEWAL_STEPS, LEARNING_RATE = 10, 2, 3, 1e-3
LAYERS = {"p": 0.5, "seed": 19}  # in some steps all layers are masked, in others none


def sparsegrad(**settings: Any) -> Callable[[], Any]:
    settings = {
        "density": 0.2,
        "slack": 5,  # bases as wide as the layer, which are not rounded: sums in another order stay within 1e-5
        "warmup_steps": 4,
        "renewal_steps": RENEWAL_STEPS,
        "task_type": "CAUSAL_LM",
        **settings,
    }
    return lambda: SparseGradConfig(**settings)


def graddrop(variant: str, **settings: Any) -> Callable[[], Any]:
    return lambda: GradDropConfig.from_variant(variant, task_type="CAUSAL_LM", **settings)


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["up_proj", "down_proj"], task_type="CAUSAL_LM")


HELD = graddrop("GradDrop", p=0.5, frozen="hold")
OF_EXPERTS = {"target_modules": [], "target_parameters": EXPERTS}
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"config": lora},
    "default": {"config": sparsegrad(), "warm_up": "before"},
    "default, warmed up afterwards": {"config": sparsegrad(), "warm_up": "after"},
    "default and a head, warmed up afterwards": {
        "config": sparsegrad(modules_to_save=["lm_head"]),
        "warm_up": "after",
    },
    "default, warmed up in training": {"config": sparsegrad()},
    "not renewed": {"config": sparsegrad(renewal_steps=0), "warm_up": "before"},
    "few values": {"config": sparsegrad(density=0.0015), "warm_up": "before"},
    "dynamic": {"config": sparsegrad(support="dynamic"), "warm_up": "before"},
    "GradDrop": {"config": graddrop("GradDrop", p=0.5)},
    "GradDrop held": {"config": HELD},
    "GradDrop-Epoch": {"config": graddrop("GradDrop-Epoch")},
    "GradDrop-Epoch-Toggle": {"config": graddrop("GradDrop-Epoch-Toggle")},
    "Layer-GradDrop": {"config": graddrop("Layer-GradDrop", **LAYERS)},
    "Layer-GradDrop, not held": {"config": graddrop("Layer-GradDrop", frozen="gradient", **LAYERS)},
    "experts": {"config": sparsegrad(**OF_EXPERTS), "model": mixtral, "warm_up": "before"},
    "experts, warmed up in training": {"config": sparsegrad(**OF_EXPERTS), "model": mixtral},
    "GradDrop held, experts": {
        "config": graddrop("GradDrop", p=0.5, frozen="hold", **OF_EXPERTS),
        "model": mixtral,
    },
    "LoRA, experts": {
        "config": lambda: LoraConfig(r=4, task_type="CAUSAL_LM", **OF_EXPERTS),
        "model": mixtral,
    },
    "GradDrop on LoRA": {"config": lora, "masks": HELD},
    "GradDrop on LoRA, put on afterwards": {"config": lora, "masks": HELD, "masks_after": True},
    "GradDrop on the default": {
        "config": sparsegrad(),
        "model": lambda: llama().double(),
        "warm_up": "before",
        "masks": HELD,
    },
}


def device() -> torch.device:
    """The GPU of the rank with NCCL, else the CPU."""
    is_on_gpu = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda", dist.get_rank()) if is_on_gpu else torch.device("cpu")


def share(step: int, micro_batch: int = 0) -> dict[str, torch.Tensor]:
    """This rank's rows of a global batch; there is no padding, so that equal shares weigh the same."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    ids = batch(step % 4 + 10 * micro_batch)["input_ids"][rank::world].to(device())
    return {"input_ids": ids, "labels": ids}


def wrap(model: Any, engine: str) -> Any:
    """The model as an engine trains it."""
    kind = engine.partition(",")[0]
    if kind in ("DDP", "ZeRO redundancy"):
        return DistributedDataParallel(model)
    if kind == "FSDP2":
        mesh = dist.device_mesh.init_device_mesh(device().type, (dist.get_world_size(),))
        further: dict[str, Any] = {}
        if "offload" in engine:
            further["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
        if "bf16" in engine:
            further["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in [each for each in model.modules() if isinstance(each, LlamaDecoderLayer | MixtralDecoderLayer)]:
            fully_shard(block, mesh=mesh, **further)
        return fully_shard(model, mesh=mesh, **further)
    if kind == "FSDP1":
        policy = ModuleWrapPolicy({LlamaDecoderLayer})
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=device())
    assert kind == "one process"
    return model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone()


def optimizer_for(model: Any, method: str, engine: str = "") -> torch.optim.Optimizer:
    settings = {"lr": LEARNING_RATE, "weight_decay": 0.01}
    if engine == "ZeRO redundancy":
        settings["optimizer_class"] = SparseGradAdam if method == "dynamic" else torch.optim.AdamW
        return ZeroRedundancyOptimizer([p for p in model.parameters() if p.requires_grad], **settings)
    if method == "dynamic":
        return create_sparsegrad_optimizer(model, **settings)
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **settings)


def make(method: str) -> tuple[Any, GradDrop | None]:
    """A model as it is before an engine wraps it, and the object that masks it or announces its epochs."""
    settings = METHODS[method]
    torch.manual_seed(0)
    model = get_peft_model(settings.get("model", llama)(), settings["config"]()).to(device())
    if settings.get("warm_up") == "before":
        warmup(model, [share(step) for step in range(4)], 4, progress=False)
    masks = None
    if "masks" in settings and not settings.get("masks_after"):
        masks = GradDrop(model, settings["masks"]())
    if "Epoch" in method:
        masks = GradDrop(model, num_epochs=EPOCHS)
    return model, masks


def train_by_torch(engine: str, method: str) -> dict[str, Any]:
    """Train by a loop of torch; "accumulation" in the engine's name means two micro-batches a step."""
    settings = METHODS[method]
    model, masks = make(method)
    wrapped = wrap(model, engine)
    if settings.get("warm_up") == "after":
        warmup(wrapped, [share(step) for step in range(4)], 4, progress=False)
    if settings.get("masks_after"):
        masks = GradDrop(wrapped, settings["masks"]())
    optimizer = optimizer_for(model, method, engine)
    micro_batches = 2 if "accumulation" in engine else 1
    for step in range(STEPS):
        if "Epoch" in method and step % (STEPS // EPOCHS) == 0:
            masks.set_epoch(step * EPOCHS // STEPS)
        for micro_batch in range(micro_batches):
            with not_reduced(wrapped, engine) if micro_batch < micro_batches - 1 else contextlib.nullcontext():
                (wrapped(**share(step, micro_batch)).loss / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()
    return results(model)


@contextlib.contextmanager
def not_reduced(wrapped: Any, engine: str):
    """The passes inside leave their gradients on their ranks; with "reduced each time" they do not."""
    if "reduced each time" in engine or engine.startswith("one process"):
        yield
    elif engine.startswith("FSDP2"):
        wrapped.set_requires_gradient_sync(False)
        yield
        wrapped.set_requires_gradient_sync(True)
    else:
        with wrapped.no_sync():
            yield


def results(model: Any, state: dict[str, torch.Tensor] | None = None) -> dict[str, Any]:
    """Everything of the adapter, in one piece."""
    state = model.state_dict() if state is None else state
    own = {
        name: tensor
        for name, tensor in state.items()
        if any(key in name for key in ("lora_", "sparsegrad_", "graddrop_"))
    }
    supports = {
        name: layer.adapter("default").indices
        for name, layer in model.named_modules()
        if isinstance(layer, SparseGradLayer)
    }
    return {"state": {name: whole(tensor) for name, tensor in own.items()}, "supports": supports}
