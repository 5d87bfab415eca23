"""Layers whose gradient is zero in a warm-up, as behind a gate that begins at zero."""

import torch
from peft import get_peft_model
from torch import nn

from peft_sparsegrad import SparseGradConfig, warmup
from peft_sparsegrad.functional import spread_support
from peft_sparsegrad.sparsegrad.layer import layer_adapters


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.open, self.shut = nn.Linear(32, 64), nn.Linear(32, 64)
        self.gate, self.out = nn.Parameter(torch.zeros(())), nn.Linear(64, 4)

    def forward(self, x, labels):
        y = self.out(torch.relu(self.open(x)) + self.gate * self.shut(x))
        return {"loss": nn.functional.cross_entropy(y, labels)}


def test_the_support_is_spread_over_the_core_and_no_block_of_neighbours(caplog):
    model = get_peft_model(Gated(), SparseGradConfig(target_modules=["open", "shut"], density=0.05, warmup_steps=4))
    warmup(model, [{"x": torch.randn(8, 32), "labels": torch.randint(4, (8,))} for _ in range(4)], progress=False)
    adapters = {adapter.plan.name: adapter for adapter in layer_adapters(model, "default")}
    spread = spread_support(adapters["shut"].plan.num_entries, adapters["shut"].plan.k)
    assert "no gradient of ['shut'], so their supports are data-free" in caplog.text
    assert torch.equal(adapters["shut"].indices.sort().values, spread)
    assert not torch.equal(adapters["open"].indices.sort().values, spread)
