"""The optimizer for dynamic supports: Adam that moves only where there is a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

from .sparsegrad.layer import SparseGradLayer


class SparseGradAdam(AdamW):
    """AdamW whose parameter groups marked `sparse=True` move only where their gradient is not zero.

    For such a group, entry i of a parameter with gradient g_i ≠ 0 at step t takes an AdamW step, with
    m_i ← β₁ m_i + (1 − β₁) g_i and v_i ← β₂ v_i + (1 − β₂) g_i², bias corrections of step t, and weight decay on θ_i;
    every other entry keeps its value and its moments (SparseGrad, section 5.1: "the masked version of Adam"). Other
    groups are plain AdamW.

    Args:
        params: Parameters or groups, as for any optimizer.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        sparse: Default of the groups that do not say.
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
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.defaults["sparse"] = sparse
        for group in self.param_groups:
            group.setdefault("sparse", sparse)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step; `closure`, if given, computes the loss again and is called first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        kept_aside = []
        for group in self.param_groups:
            for parameter in group["params"] if group.get("sparse") else ():
                if parameter.grad is not None:
                    self._sparse_step(parameter, parameter.grad, group)
                    kept_aside.append((parameter, parameter.grad))
                    parameter.grad = None  # AdamW passes over it
        super().step()
        for parameter, gradient in kept_aside:
            parameter.grad = gradient
        return loss

    def _sparse_step(self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        step, (beta1, beta2) = state["step"].item(), group["betas"]
        where = gradient.nonzero(as_tuple=True)
        g = gradient[where]
        m = state["exp_avg"][where].lerp_(g, 1 - beta1)
        v = state["exp_avg_sq"][where].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        state["exp_avg"][where], state["exp_avg_sq"][where] = m, v
        denominator = (v / (1 - beta2**step)).sqrt_().add_(group["eps"])
        update = m.div_(1 - beta1**step).div_(denominator)
        theta = parameter[where]
        parameter[where] = theta.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])


def create_sparsegrad_optimizer(
    model: nn.Module,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    other_lr: float | None = None,
) -> SparseGradAdam:
    """The optimizer for a model with a SparseGrad adapter, for a training loop or `Trainer(optimizers=(it, None))`.

    Values of dynamic supports move where their gradient is not zero. Everything else that trains (static supports, a
    task head) is under AdamW.

    Args:
        model: The model.
        lr: Learning rate of the SparseGrad values.
        betas: Decay of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        other_lr: Learning rate of what is not SparseGrad's; None for `lr`.

    Raises:
        ValueError: If the model has no SparseGrad values that train.
    """
    values, dynamic = set(), set()
    for layer in (module for module in model.modules() if isinstance(module, SparseGradLayer)):
        for name, parameter in layer.sparsegrad_values.items():
            values.add(parameter)
            if layer.adapter(name).plan.dynamic:
                dynamic.add(parameter)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not values.intersection(trained):
        raise ValueError(
            "the model has no SparseGrad values that train: is the adapter active, and not in inference mode?"
        )
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
