"""What is measured: models, batches and methods. A method is a line of `CONTENDERS`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..models import Shape

FROZEN = "frozen"
"""Forward and backward pass of the frozen model: what no method can undercut."""

CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora r=16": ("lora", {"rank": 16}),
    "sparsegrad": ("sparsegrad", {}),
    "lora r=16, again": ("lora", {"rank": 16}),
    "columns": ("columns", {}),
    "sparsegrad, narrower sides": ("sparsegrad", {"rank": "narrower", "slack": 12.0}),
    "columns, slack 12": ("columns", {"slack": 12.0}),
    FROZEN: (FROZEN, {}),
    "full": ("full", {}),
    "lora r=8": ("lora", {"rank": 8}),
    "lora r=32": ("lora", {"rank": 32}),
    "lora r=64": ("lora", {"rank": 64}),
    "dora r=16": ("lora", {"rank": 16, "use_dora": True}),
    "graddrop": ("graddrop", {}),
    "paper": ("paper", {"warmup_steps": 0}),
}
"""Label to method in `experiments.methods.METHODS` and its settings, the most important first.

LoRA of rank 16 comes before and after SparseGrad: the ratio of its two rows is what the machine's noise alone makes.
`paper` trains at once, in bases that need no data: a step costs the same in any basis.
"""

BASELINE = "lora r=16"
"""The contender that times and bytes are divided by."""


@dataclass(frozen=True)
class Setting:
    """A model and the batches on which each method is measured.

    Attributes:
        shape: Sizes of the model, and the sequences of the smallest batch.
        weights: Data type of the base model's weights.
        tokens: Tokens in each batch, a multiple of the sequence's length.
    """

    shape: Shape
    weights: torch.dtype
    tokens: tuple[int, ...]

    def of_tokens(self, tokens: int) -> Shape:
        """The shape with a batch of so many tokens."""
        return replace(self.shape, batch=tokens // self.shape.length)


BERT = Shape("bert", hidden=768, intermediate=3072, layers=12, heads=12, batch=8, length=128, vocabulary=30522)
LLAMA = Shape("llama", hidden=2048, intermediate=8192, layers=16, heads=32, batch=2, length=512, vocabulary=32000)
SETTINGS = {
    "bert": Setting(BERT, torch.float32, tokens=(1024, 4096)),
    "llama": Setting(LLAMA, torch.bfloat16, tokens=(1024, 4096)),
}

_TINY: dict[str, Any] = {"hidden": 64, "intermediate": 256, "layers": 2, "heads": 4, "length": 16, "vocabulary": 100}
SMALL_SETTINGS = {
    name: Setting(replace(setting.shape, **_TINY, batch=2), setting.weights, tokens=(32, 64))
    for name, setting in SETTINGS.items()
}
