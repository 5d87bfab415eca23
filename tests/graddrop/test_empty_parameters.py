"""GradDrop on models with parameters that have no entries."""

from __future__ import annotations

import pytest
import torch
from graddrop_tools import loss_of, sgd
from peft import get_peft_model
from torch import nn

from peft_sparsegrad import GradDrop, GradDropConfig


class WithEmpty(nn.Module):
    """A layer, a parameter without entries, and a layer without inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.empty, self.blind = nn.Linear(8, 4), nn.Parameter(torch.empty(0, 3)), nn.Linear(0, 4)

    def forward(self, x):
        return self.layer(x) + self.empty.sum() + self.blind(x[:, :0])


@pytest.mark.parametrize("variant", ["GradDrop", "Layer-GradDrop", "GradDrop-Epoch", "GradFreeze-TopDown"])
@pytest.mark.parametrize("is_adapter", [False, True])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_parameters_without_entries_change_nothing(variant, is_adapter):
    base = nn.Sequential(WithEmpty().double())
    config = GradDropConfig.from_variant(variant, target_modules=["layer", "blind"] if is_adapter else ["0"])
    model = get_peft_model(base, config) if is_adapter else base
    graddrop = GradDrop(model, None if is_adapter else config, num_epochs=2)
    optimizer = sgd(model)
    for epoch in range(2):
        graddrop.set_epoch(epoch)
        loss_of(model, epoch).backward()
        optimizer.step()
        optimizer.zero_grad()
        report = graddrop.report()
        assert 0 < report["moved"] <= 1
        assert 0 < report["active"] <= 1
