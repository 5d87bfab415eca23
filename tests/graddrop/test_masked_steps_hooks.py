"""What GradDrop hooks into: others in the process train as before, and nothing is left behind."""

import gc
import weakref

import pytest
import torch
from graddrop_tools import adamw, deltas, dropped, loss_of, masks_of, sgd, step, tower

from peft_sparsegrad import GradDrop, GradDropConfig
from peft_sparsegrad.common.training import optimizer_watcher
from peft_sparsegrad.common.training.optimizer_watcher import observers


def test_unrelated_model_trains_as_without_graddrop():
    model = dropped(tower(), p=0.9, frozen="hold")
    loss_of(model).backward()
    bystander, twin = tower(), tower()
    optimizer = torch.optim.AdamW(bystander.parameters(), lr=0.01, weight_decay=0.1)
    for number in range(3):
        step(bystander, optimizer, number)
    expected = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.1)
    for number in range(3):
        step(twin, expected, number)
    assert all(torch.equal(p, twin.get_parameter(name)) for name, p in bystander.named_parameters())
    assert masks_of(model).progress.step == 0
    assert all(delta.grad is not None for delta in deltas(model).values())


def test_hooks_are_registered_once():
    from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

    dropped(tower())
    before = len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)
    dropped(tower())
    GradDrop(tower(), GradDropConfig())
    assert (len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)) == before


@pytest.mark.parametrize("settings", [{"p": 0.5, "frozen": "hold"}, {"granularity": "layer"}], ids=str)
def test_nothing_is_kept_between_steps(settings):
    model = dropped(tower(), **settings)
    optimizer = adamw(model)
    step(model, optimizer)
    assert optimizer_watcher._RUNNING not in vars(optimizer)


@pytest.mark.parametrize("kind", ["adapter", "plain"])
def test_deleted_model_and_optimizer_are_freed(kind):
    gc.collect()
    if kind == "adapter":
        model, graddrop = dropped(tower(), p=0.5, frozen="hold"), None
    else:
        model = tower()
        graddrop = GradDrop(model, GradDropConfig(p=0.5, frozen="hold"))
    optimizer = adamw(model)
    step(model, optimizer)
    dead = [weakref.ref(thing) for thing in (model, optimizer, *model.parameters())]
    del model, optimizer, graddrop
    gc.collect()
    assert not any(reference() for reference in dead)


def test_dropped_reference_to_graddrop_does_not_take_the_masks_off_quietly():
    """`GradDrop(model, config)` without keeping the object: gradients stay masked, so entries must stay held."""
    model = tower()
    GradDrop(model, GradDropConfig(p=0.5, frozen="hold"))
    gc.collect()
    optimizer = adamw(model, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model, optimizer)
    moved = torch.cat([(p != before[n]).flatten() for n, p in model.named_parameters() if n.startswith("layers.")])
    assert 0.4 < moved.double().mean() < 0.6


def test_remove_takes_everything_off():
    model, twin = tower(), tower()
    graddrop = GradDrop(model, GradDropConfig(p=0.9, frozen="hold"))
    graddrop.remove()
    for which in (model, twin):
        optimizer = adamw(which, weight_decay=0.1)
        for number in range(3):
            step(which, optimizer, number)
    assert all(torch.equal(p, twin.get_parameter(name)) for name, p in model.named_parameters())
    assert not any(p._backward_hooks for p in model.parameters())
    assert all(each is not graddrop for each in observers())
    assert graddrop.masked_parameters() == []
    graddrop.remove()


def test_adapter_keeps_its_masks_when_graddrop_is_removed():
    model = dropped(tower(), p=0.5)
    GradDrop(model).remove()
    loss_of(model).backward()
    zeros = torch.cat([(delta.grad == 0).flatten() for delta in deltas(model).values()])
    assert 0.4 < zeros.double().mean() < 0.6
    step(model, sgd(model))


def test_refusal_of_the_number_of_epochs_leaves_no_hooks():
    model = tower()
    with pytest.raises(ValueError, match="`toggle`"):
        GradDrop(model, GradDropConfig.from_variant("GradFreeze-Toggle-TopDown"), num_epochs=9)
    assert not any(p._backward_hooks for p in model.parameters())
