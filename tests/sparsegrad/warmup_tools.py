"""Batches for a warm-up, and an adapter's bases, supports and values to compare."""

import torch
from tiny import batch

from peft_sparsegrad import SparseGradLinear

BATCHES = [batch(seed) for seed in range(4)]


def layers(model):
    return [module for module in model.modules() if isinstance(module, SparseGradLinear)]


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items() if "sparsegrad_" in key}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
