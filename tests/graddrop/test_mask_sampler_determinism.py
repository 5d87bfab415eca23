"""What a mask depends on: names, seed and step; not on other modules, order or wrappers."""

import copy

import pytest
import torch
from graddrop_tools import LAYERWISE_SETS, deltas, dropped, loss_of, masks_of, moved_in_a_step, sgd, tower
from torch import nn

from peft_sparsegrad import GradDrop, GradDropConfig


def gradients_of(model):
    loss_of(model).backward()
    return {name: delta.grad != 0 for name, delta in deltas(model).items() if delta.grad is not None}


def test_mask_does_not_depend_on_which_other_modules_train():
    everything = gradients_of(dropped(tower(), p=0.5))
    some = gradients_of(dropped(tower(), p=0.5, target_modules=["down"]))
    assert len(some) == 6
    assert all(torch.equal(everything[name], kept) for name, kept in some.items())


def test_mask_of_a_layer_does_not_depend_on_which_other_layers_train():
    masks = [masks_of(dropped(tower(8), "Layer-GradDrop", p=0.5, layers_to_transform=ids)) for ids in (None, [6, 2])]
    for number in range(8):
        for one in masks:
            one.progress.set_step(number)
        assert all(masks[0].trains("", block) == masks[1].trains("", block) for block in masks[1].blocks)


def test_mask_does_not_depend_on_the_order_of_modules():
    class Backwards(type(tower())):
        def __init__(self):
            super().__init__()
            self.layers[0].norm = self.layers[0]._modules.pop("norm")

    backwards = Backwards().double()
    assert list(backwards.layers[0]._modules) == ["up", "down", "norm"]
    one, other = gradients_of(dropped(backwards, p=0.5)), gradients_of(dropped(tower(), p=0.5))
    assert all(torch.equal(other[name], kept) for name, kept in one.items())


def test_masks_of_parameters_seeds_and_steps_differ():
    model = dropped(tower(), p=0.5)
    kept = gradients_of(model)
    other = gradients_of(dropped(tower(), p=0.5, seed=1))
    for name in ("layers.0.up.weight", "layers.2.down.weight"):
        assert 0.3 < (kept[name] == other[name]).double().mean() < 0.7
    assert 0.3 < (kept["layers.0.up.weight"] == kept["layers.1.up.weight"]).double().mean() < 0.7


@pytest.mark.parametrize("granularity", ["element", "layer"])
def test_sets_of_other_seeds_differ(granularity):
    settings = {**LAYERWISE_SETS, "granularity": granularity, "num_epochs": 2}
    seen = []
    for seed in (0, 1):
        model = dropped(tower(num_blocks=8), **settings, seed=seed)
        GradDrop(model).set_epoch(0)
        seen.append(torch.cat([moved.flatten() for moved in moved_in_a_step(model, sgd(model)).values()]))
    assert seen[0].double().mean().item() == pytest.approx(seen[1].double().mean().item(), abs=0.1)
    assert not torch.equal(*seen)


class Wrapped(nn.Module):
    """Names parameters as DistributedDataParallel does."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "ddp": Wrapped,
    "compile": compiled,
    "compile in ddp": lambda model: Wrapped(compiled(model)),
    "ddp in compile": lambda model: compiled(Wrapped(model)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("variant", ["GradDrop", "Layer-GradDrop"])
def test_mask_does_not_depend_on_wrapping(wrap, variant):
    config = GradDropConfig.from_variant(variant, p=0.5)
    kept = []
    for which in (lambda m: m, wrap):
        plain = tower(num_blocks=8)
        wrapped = which(plain)
        graddrop = GradDrop(wrapped, config)
        loss_of(wrapped).backward()
        kept.append({name: p.grad != 0 for name, p in plain.named_parameters()})
        graddrop.remove()
    assert any(not entries.all() for entries in kept[0].values())
    assert all(torch.equal(kept[1][name], entries) for name, entries in kept[0].items())


def test_steps_of_a_copy_do_not_advance_the_masks_of_the_original():
    model = dropped(tower(), p=0.5)
    copied = copy.deepcopy(model)
    moved_in_a_step(copied, sgd(copied))
    kept, others = gradients_of(model), gradients_of(dropped(tower(), p=0.5))
    assert all(torch.equal(others[name], entries) for name, entries in kept.items())
    assert not torch.equal(kept["layers.0.up.weight"], gradients_of(copied)["layers.0.up.weight"])
