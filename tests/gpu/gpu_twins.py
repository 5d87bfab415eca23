"""A small LLaMA with an adapter on the device under test, and its slow twin: a copy in float64 on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.peft_model import PeftModel
from tiny import batch, llama
from torch import nn

from peft_sparsegrad import GradDropConfig, SparseGradConfig, create_sparsegrad_optimizer

MLP = ["up_proj", "down_proj"]


def lora(**settings) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=MLP, task_type="CAUSAL_LM", **settings)


def sparsegrad(variant: str = "sparsegrad", **settings) -> SparseGradConfig:
    """SparseGrad at 5%, in a basis that needs no data unless `warmup_steps` is given."""
    settings = {"density": 0.05, "warmup_steps": 0, "task_type": "CAUSAL_LM", **settings}
    return SparseGradConfig.from_variant(variant, **settings)


def graddrop(variant: str = "GradDrop", **settings) -> GradDropConfig:
    return GradDropConfig.from_variant(variant, task_type="CAUSAL_LM", **settings)


CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lora,
    "sparsegrad": sparsegrad,
    "full-bases": lambda: sparsegrad("full-bases"),
    "paper": lambda: sparsegrad("paper"),
    "meprop": lambda: sparsegrad("meprop"),
    "graddrop": graddrop,
}


def small_llama(blocks: int = 3) -> nn.Module:
    """Blocks of width 64 and 256, in training mode."""
    return llama(hidden_size=64, intermediate_size=256, num_hidden_layers=blocks).train()


def attached(config: PeftConfig, dtype: torch.dtype = torch.float32, blocks: int = 3) -> PeftModel:
    """Return a small model in `dtype`, on the CPU, with an adapter in float32."""
    return get_peft_model(nn.Module.to(small_llama(blocks), dtype), config)  # pyright: ignore[reportArgumentType]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def disturb(model: nn.Module) -> None:
    """Move everything that trains away from its first values, with which an adapter changes nothing."""
    for parameter in trained(model).values():
        parameter.add_(torch.randn_like(parameter), alpha=0.02)


def double_twin(model: nn.Module) -> nn.Module:
    """Return a copy of a model on the CPU, in float64: the slow and exact way."""
    return copy.deepcopy(model).double()


def logits_on(model: nn.Module) -> torch.Tensor:
    """Return the logits of a batch that no test trains on, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return model(input_ids=batch_on(device_of(model), seed=9)["input_ids"]).logits


def change_of_output(model: PeftModel) -> torch.Tensor:
    """Return what the adapter adds to these logits."""
    with model.disable_adapter():
        base = logits_on(model)
    return logits_on(model) - base


def batch_on(device: torch.device, seed: int = 0) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in batch(seed).items()}


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def relative_error(found: torch.Tensor, true: torch.Tensor) -> float:
    """‖found − true‖ / ‖true‖, in float64 on the CPU."""
    found, true = found.detach().cpu().double(), true.detach().cpu().double()
    return ((found - true).norm() / true.norm()).item()


def outcome(
    model: nn.Module, autocast: AbstractContextManager | None = None, magnified: float = 2.0**8
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of a batch and the gradient of all that trains, as one vector.

    The loss is magnified for the backward pass, as by a gradient scaler: float16 has no small numbers.
    """
    with autocast or nullcontext():
        output = model(**batch_on(device_of(model)))
    (magnified * output.loss).backward()
    gradients = [parameter.grad.flatten() / magnified for parameter in trained(model).values()]
    for parameter in trained(model).values():
        parameter.grad = None
    return output.logits, torch.cat([gradient.double() for gradient in gradients])


def optimizer_of(model: PeftModel, lr: float) -> torch.optim.Optimizer:
    """AdamW, or the optimizer of a dynamic support."""
    config = model.peft_config["default"]
    if getattr(config, "support", None) == "dynamic":
        return create_sparsegrad_optimizer(model, lr)
    return torch.optim.AdamW(trained(model).values(), lr=lr)


def train_on_device(model: PeftModel, steps: int, lr: float = 0.01) -> list[float]:
    """A plain loop of float32 or float64 on the model's device; the losses."""
    optimizer, losses = optimizer_of(model, lr), []
    for step in range(steps):
        loss = model(**batch_on(device_of(model), seed=step % 4)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
