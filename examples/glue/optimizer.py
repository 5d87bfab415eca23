"""The optimizer of a run, with one learning rate for the method's own values and one for the rest."""

from __future__ import annotations

from peft import PeftModel
from torch.optim import AdamW, Optimizer

from experiments.methods import METHODS
from experiments.optimizers import set_rate

from .model import TrainedModel
from .runs import Run


def make_optimizer(run: Run, trained: TrainedModel) -> Optimizer:
    """The method's optimizer, or AdamW.

    The method's own values have the rate `run.adapter_lr`, if there is one, and all else has `run.lr`. Weights of the
    model decay; what a method adds to them does not.
    """
    adapter_lr = run.lr if run.adapter_lr is None else run.adapter_lr
    make = METHODS[run.method].make_optimizer
    if make is not None:
        optimizer = make(trained.model, adapter_lr)
    else:
        optimizer = AdamW([*trained.adapter, *trained.rest], lr=adapter_lr, weight_decay=0.0)
    set_rate(optimizer, trained.rest, run.lr)
    weights = set(trained.rest if isinstance(trained.model, PeftModel) else [*trained.adapter, *trained.rest])
    for group in optimizer.param_groups:
        group["weight_decay"] = run.weight_decay if weights.issuperset(group["params"]) else 0.0
    return optimizer
