"""The optimizer for dynamic supports: an Adam that moves only entries with a gradient."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from ..common.training.pieces import local_part
from .adapter import LayerAdapter
from .layer import WAY_TO_TRAIN, adapted_layers


class SparseGradAdam(Optimizer):
    """AdamW whose parameter groups marked `sparse=True` move only where their gradient is not zero.

    For such a group, entry i of a parameter with gradient g_i ≠ 0 at step t takes an AdamW step, with
    m_i ← β₁ m_i + (1 − β₁) g_i and v_i ← β₂ v_i + (1 − β₂) g_i², bias corrections of step t, and weight decay on θ_i;
    every other entry keeps its value and its moments (SparseGrad, section 5.1: "the masked version of Adam"). Other
    groups are plain AdamW.

    Args:
        params: Parameters or groups, as for any optimizer.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Term added to the denominator.
        weight_decay: Decoupled weight decay.
        sparse: Default for groups that do not set `sparse`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        sparse: bool = True,
    ) -> None:
        for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
            if value < 0:
                raise ValueError(f"`{name}` must not be negative, it is {value}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"`betas` must be in [0, 1), they are {betas}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "sparse": sparse}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step; `closure`, if given, computes the loss again and is called first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["sparse"]:
                for parameter in parameters:
                    self._sparse_step(parameter, parameter.grad, group)
            elif parameters:
                self._dense_step(parameters, group)
        return loss

    def _moments(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state

    def _sparse_step(self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state = self._moments(parameter)
        state["step"] += 1
        step, (beta1, beta2) = state["step"].item(), group["betas"]
        parameter, gradient = local_part(parameter), local_part(gradient)
        exp_avg, exp_avg_sq = local_part(state["exp_avg"]), local_part(state["exp_avg_sq"])
        where = gradient.nonzero(as_tuple=True)
        g = gradient[where]
        m = exp_avg[where].lerp_(g, 1 - beta1)
        v = exp_avg_sq[where].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        exp_avg[where], exp_avg_sq[where] = m, v
        denominator = (v / (1 - beta2**step)).sqrt_().add_(group["eps"])
        update = m.div_(1 - beta1**step).div_(denominator)
        theta = parameter[where]
        parameter[where] = theta.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])

    def _dense_step(self, parameters: list[torch.Tensor], group: dict[str, Any]) -> None:
        states = [self._moments(parameter) for parameter in parameters]
        adamw(
            parameters,
            [cast(torch.Tensor, parameter.grad) for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def create_sparsegrad_optimizer(
    model: nn.Module,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    other_lr: float | None = None,
) -> SparseGradAdam:
    """Return an optimizer for a model with a SparseGrad adapter.

    It can be used in a training loop or with `Trainer(optimizers=(optimizer, None))`.

    Values of dynamic supports move only where their gradient is not zero. Everything else that trains (static
    supports, a task head) is trained with AdamW.

    Args:
        model: The model.
        lr: Learning rate of the SparseGrad values.
        betas: Decay of the two moments.
        eps: Term added to the denominator.
        weight_decay: Decoupled weight decay.
        other_lr: Learning rate of all other parameters; None for `lr`.

    Raises:
        ValueError: If no SparseGrad values of the model train, as after loading for inference.
    """
    adapters = [module for module in model.modules() if isinstance(module, LayerAdapter)]
    values = {adapter.values for adapter in adapters}
    dynamic = {adapter.values for adapter in adapters if adapter.plan.dynamic}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _check_trains(model, values.intersection(trained))
    groups = [
        {"params": [p for p in trained if p in dynamic], "sparse": True},
        {"params": [p for p in trained if p in values - dynamic], "sparse": False},
        {
            "params": [p for p in trained if p not in values],
            "sparse": False,
            "lr": lr if other_lr is None else other_lr,
        },
    ]
    groups = [group for group in groups if group["params"]]
    return SparseGradAdam(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, sparse=False)


def _check_trains(model: nn.Module, trained: set[nn.Parameter]) -> None:
    """Raise a ValueError, with the way to train them, if there are no SparseGrad values that train."""
    layers = adapted_layers(model)
    if not trained:
        names = sorted({name for layer in layers for name in layer.sparsegrad_adapter})
        raise ValueError(f"the model has no SparseGrad values that train, its adapters are {names}: {WAY_TO_TRAIN}")
