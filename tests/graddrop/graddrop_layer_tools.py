"""Layers of every kind that GradDrop trains, each with an adapter that is not zero."""

import copy

import torch
from peft import get_peft_model
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from peft_sparsegrad import GradDropConfig


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, **kwargs):
        return self.layer(x, **kwargs)


def conv(**settings):
    return lambda: nn.Conv2d(4, 6, **{"kernel_size": 3, **settings}), (2, 4, 9, 8)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (2, 3, 6)),
    "linear, two dimensions": (lambda: nn.Linear(6, 5), (3, 6)),
    "linear, one dimension": (lambda: nn.Linear(6, 5), (6,)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (2, 3, 6)),
    "conv1d": (lambda: Conv1D(5, 6), (2, 3, 6)),
    "conv": conv(),
    "conv, one image": (conv()[0], (4, 9, 8)),
    "conv without bias": conv(bias=False),
    "conv, stride": conv(stride=2, padding=1),
    "conv, uneven stride": conv(stride=(2, 3), padding=(1, 0)),
    "conv, dilation": conv(dilation=2, padding=2),
    "conv, groups": conv(groups=2, padding=1),
    "conv, depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 9, 8)),
    "conv, same": conv(padding="same", dilation=2),
    "conv, same with an even kernel": conv(padding="same", kernel_size=(2, 4)),
    "conv, valid": conv(padding="valid"),
    "conv, circular": conv(padding=1, padding_mode="circular"),
    "conv, reflect": conv(padding=(1, 2), padding_mode="reflect", stride=2),
    "conv, replicate": conv(padding="same", padding_mode="replicate"),
    "layer norm": (lambda: nn.LayerNorm(6), (2, 3, 6)),
    "layer norm without bias": (lambda: nn.LayerNorm(6, bias=False), (2, 3, 6)),
    "rms norm": (lambda: nn.RMSNorm(6), (2, 3, 6)),
    "llama's rms norm": (lambda: LlamaRMSNorm(6), (2, 3, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (2, 4, 3, 3)),
}


def made(kind, **settings):
    """A base layer, and a copy of it with an adapter that is not zero; both in float64."""
    if kind in LAYERS:
        layer, shape = LAYERS[kind][0]().double(), LAYERS[kind][1]
    else:
        layer, shape = nn.Embedding(7, 5, padding_idx=2).double(), (3, 4)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    config = GradDropConfig(target_modules=["layer"], init_weights=False, **settings)
    model = get_peft_model(One(copy.deepcopy(layer)), config)
    x = torch.randint(0, 7, shape) if kind == "embedding" else torch.randn(shape, dtype=torch.float64)
    return layer, model, x
