"""Ways of training the same linear layers of the same model, each ready to take a step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from experiments.memory import resident_tensors
from experiments.methods import METHODS, targeted
from peft_sparsegrad import SparseGradAdam, SparseGradConfig, SparseGradLinear

from .models import Shape, build_model
from .paper_layer import attach_paper_layers

FROZEN, LORA, STATIC, MEPROP, PAPER, FULL = "frozen", "lora", "sparsegrad", "meprop", "paper layer", "full"
COLUMNS = "columns"
DYNAMIC, DYNAMIC_SD = "sparsegrad-dynamic", "sparsegrad-dynamic, sparse-by-dense"
ON_OUTPUT = ", delta on the output"  # never written out
CONTENDERS = (FROZEN, LORA, STATIC, MEPROP, DYNAMIC, DYNAMIC_SD, PAPER, FULL)
TWO_WAYS = (LORA, STATIC, STATIC + ON_OUTPUT, MEPROP, MEPROP + ON_OUTPUT)
NAMED = (LORA, *SparseGradConfig.variants)
SLACKS = (3.0, 6.0, 12.0, 24.0)
SWEEP = (LORA, *(f"slack {slack:g}" for slack in SLACKS))
COMPILED = ", compiled"
TO_COMPILE = (LORA, STATIC, LORA + COMPILED, STATIC + COMPILED)
CHECKPOINTED = ", gradient checkpointing"
LEAN = (LORA, STATIC, COLUMNS)
TO_CHECKPOINT = (*LEAN, *(name + CHECKPOINTED for name in LEAN))

LEARNING_RATE = 1e-4


@dataclass
class Contender:
    """A model and what takes its step.

    Attributes:
        name: Its name in the tables.
        model: The model; the embeddings' output requires a gradient.
        optimizer: None for the frozen model.
    """

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer | None

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of a batch."""
        return self.model(**batch).loss

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        """Forward and backward pass, optimizer step, zero_grad."""
        self.forward(batch).backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    @property
    def trained(self) -> int:
        """Parameters that require a gradient; with a dynamic support all entries of the cores."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def resident(self) -> Iterable[torch.Tensor]:
        """Return the tensors that stay between two steps."""
        return resident_tensors(self.model, self.optimizer)


def build_contender(name: str, shape: Shape, device: torch.device, density: float) -> Contender:
    """The contender `name` of one of the lists above, on its own copy of the model of `shape`."""
    if name.endswith(COMPILED):
        contender = build_contender(name.removesuffix(COMPILED), shape, device, density)
        return replace(contender, name=name, model=torch.compile(contender.model))  # pyright: ignore[reportArgumentType]
    if name.endswith(CHECKPOINTED):
        contender = build_contender(name.removesuffix(CHECKPOINTED), shape, device, density)
        cast(Any, contender.model).gradient_checkpointing_enable({"use_reentrant": False})
        return replace(contender, name=name)
    model = build_model(shape, device)
    if name == FROZEN:
        return Contender(name, model.requires_grad_(False), None)
    if name == PAPER:
        model = attach_paper_layers(model, targeted(model, None), density)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return Contender(name, model, SparseGradAdam(trained, lr=LEARNING_RATE))
    if name == DYNAMIC_SD:
        contender = build_contender(DYNAMIC + ON_OUTPUT, shape, device, density)
        _skip_zeros(contender.model)
        return replace(contender, name=name)
    if name.endswith(ON_OUTPUT):
        contender = Contender(name, *_attached(name.removesuffix(ON_OUTPUT), model, density))
        _keep_delta_on_the_output(contender.model)
        return contender
    if name in SWEEP and name != LORA:
        return Contender(name, *_attached(STATIC, model, density, slack=float(name.removeprefix("slack "))))
    return Contender(name, *_attached(name, model, density))


def _attached(name: str, model: nn.Module, density: float, **settings: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A method of the package's table, SparseGrad in a data-free basis: its cost does not depend on the numbers."""
    method = METHODS[name]
    overrides = {"warmup_steps": 0} if name in SparseGradConfig.variants else {}
    model = method.attach(model, None, density, **overrides, **settings)
    if method.make_optimizer is not None:
        return model, method.make_optimizer(model, LEARNING_RATE)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, torch.optim.AdamW(trained, lr=LEARNING_RATE)


def _keep_delta_on_the_output(model: nn.Module) -> None:
    """Let the layers leave the weight as it is, however many tokens there are."""
    for layer in _layers(model):
        layer.writing_out_pays = _never


def _never(*problem: object) -> bool:
    return False


def _skip_zeros(model: nn.Module) -> None:
    """Let the layers form the core's gradient with the product of the paper's section 3.3.

    No configuration asks for it, because the plain product is as fast or faster.
    """
    for adapter in (adapter for layer in _layers(model) for adapter in layer.adapters):
        adapter.skip_zeros = True


def _layers(model: nn.Module) -> list[SparseGradLinear]:
    return [module for module in model.modules() if isinstance(module, SparseGradLinear)]
