"""Groups of parameters with a learning rate of their own."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from torch.optim import Optimizer


def set_rate(optimizer: Optimizer, parameters: Collection[nn.Parameter], lr: float) -> None:
    """Give these of the optimizer's parameters groups of their own, with the learning rate `lr`."""
    chosen = set(parameters)
    for group in list(optimizer.param_groups):
        apart = [parameter for parameter in group["params"] if parameter in chosen]
        group["params"] = [parameter for parameter in group["params"] if parameter not in chosen]
        if apart:
            optimizer.add_param_group({**group, "params": apart, "lr": lr})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
