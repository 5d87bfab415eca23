"""What `GradDrop.report` says is dropped, trains and has moved."""

import pytest
import torch
from graddrop_tools import deltas, dropped, masks_of, sgd, step, tower
from peft import get_peft_model
from torch import nn

from peft_sparsegrad import GradDrop, GradDropConfig


def test_report_of_a_fresh_adapter():
    assert GradDrop(dropped(tower(), p=0.25)).report() == {"rate": 0.25, "active": 0.75, "moved": 0.0}


def test_report_of_an_adapter_after_a_step():
    model = dropped(tower(), p=0.5)
    graddrop = GradDrop(model)
    step(model, sgd(model))
    moved = torch.cat([(delta != 0).flatten() for delta in deltas(model).values()]).double().mean().item()
    assert graddrop.report() == pytest.approx({"rate": 0.5, "active": 0.5, "moved": moved})


@pytest.mark.parametrize("kind", ["adapter", "plain"])
def test_report_of_layers_that_are_unfrozen(kind):
    config = GradDropConfig.from_variant("GradFreeze-TopDown", num_epochs=3)
    model = get_peft_model(tower(), config) if kind == "adapter" else tower()
    graddrop, optimizer = GradDrop(model, None if kind == "adapter" else config), sgd(model)
    for epoch in range(3):
        graddrop.set_epoch(epoch)
        step(model, optimizer)
        share = (epoch + 1) / 3
        assert graddrop.report() == pytest.approx({"rate": 1 - share, "active": share, "moved": share})


def test_report_weighs_parameters_by_their_size():
    model = dropped(tower(num_blocks=2), "Layer-GradDrop", p=0.5, target_modules=[r"layers.0.up", "layers.1.norm"])
    graddrop = GradDrop(model)
    sizes = {"layers.0": 8 * 16 + 16, "layers.1": 16}
    for number in range(8):
        graddrop.set_step(number)
        active = sum(size for block, size in sizes.items() if masks_of(model).trains("", block))
        assert graddrop.report()["active"] == pytest.approx(active / 160)


def test_report_of_large_parameters_looks_at_a_sample():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(200, 100, bias=False))])})
    graddrop = GradDrop(model, GradDropConfig())
    weight = model["layers"][0][0].weight
    with torch.no_grad():
        weight[:50] += 1
    assert graddrop.report()["moved"] == pytest.approx(0.5, abs=0.01)
    assert sum(sample.numel() for _, sample in graddrop._before) <= 4096


def test_report_counts_active_adapters_only():
    model = dropped(tower(), p=0.5)
    model.add_adapter("other", GradDropConfig(p=0.25, init_weights=False))
    assert GradDrop(model).report() == {"rate": 0.5, "active": 0.5, "moved": 0.0}
    model.set_adapter("other")
    assert GradDrop(model).report() == {"rate": 0.25, "active": 0.75, "moved": 1.0}
