"""An adapter's file: its name, one of its tensors, and deltas with a number of values."""

import torch
from safetensors.torch import load_file

FILE = "adapter_model.safetensors"
WEIGHT = "base_model.model.layers.0.up.graddrop_adapter.weight_delta"  # 16 × 8


def fill(delta, count):
    with torch.no_grad():
        flat = torch.zeros(delta.numel())
        flat[torch.randperm(delta.numel())[:count]] = torch.arange(1.0, count + 1)
        delta.copy_(flat.view(delta.shape))


def saved(model, path):
    model.save_pretrained(path)
    return load_file(path / FILE)
