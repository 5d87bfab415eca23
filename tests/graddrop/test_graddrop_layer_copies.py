"""Models with GradDrop that are copied, pickled, loaded again or deleted."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from graddrop_tools import adamw, deltas, dropped, graddrop_layers, masks_of, sgd, step, tower
from peft import PeftModel
from tiny import batch, llama, logits, train

from peft_sparsegrad import GradDrop

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(saved_in_memory(model), weights_only=False),
}


def saved_in_memory(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("variant", ["GradDrop", "Layer-GradDrop"])
def test_copy_goes_on_like_the_original(how, variant):
    model = dropped(tower(), variant, p=0.5)
    step(model, sgd(model))
    twin = COPIES[how](model)
    for which in (model, twin):
        optimizer = sgd(which)
        for seed in range(3):
            step(which, optimizer, seed)
    assert masks_of(twin) is not masks_of(model)
    assert masks_of(twin).progress.step == masks_of(model).progress.step == 3
    assert all(torch.equal(deltas(twin)[name], delta) for name, delta in deltas(model).items())


@pytest.mark.parametrize("how", COPIES)
def test_copy_is_held_too(how):
    twin = COPIES[how](dropped(tower(), "GradDrop-Epoch", num_epochs=2))
    GradDrop(twin).set_epoch(0)
    optimizer = adamw(twin, weight_decay=0.5)
    for delta in deltas(twin).values():
        delta.data.fill_(1.0)
    step(twin, optimizer)
    moved = torch.cat([(delta != 1.0).flatten() for delta in deltas(twin).values()])
    assert 0.4 < moved.double().mean() < 0.6


@pytest.mark.parametrize("how", COPIES)
def test_copy_does_not_advance_the_original(how):
    model = dropped(tower())
    twin = COPIES[how](model)
    optimizer = sgd(twin)
    for seed in range(3):
        step(twin, optimizer, seed)
    assert (masks_of(model).progress.step, masks_of(twin).progress.step) == (0, 2)


def test_copy_shares_one_set_of_masks_among_its_layers():
    twin = copy.deepcopy(dropped(tower()))
    assert len({id(layer.graddrop_sampler["default"]) for layer in graddrop_layers(twin).values()}) == 1


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reload_is_exact_and_masked(tmp_path, low_cpu_mem_usage, dtype):
    model = dropped(llama().to(dtype), "Layer-GradDrop", p=0.5)
    train(model, steps=3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        llama().to(dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True
    )
    assert all(torch.equal(deltas(loaded)[name], delta) for name, delta in deltas(model).items())
    assert torch.equal(logits(loaded), logits(model))
    loaded(**batch()).loss.backward()
    with_gradient = {
        layer.graddrop_block
        for n, layer in graddrop_layers(loaded).items()
        if layer.deltas("default").weight_delta.grad is not None
    }
    masks = masks_of(loaded)
    assert with_gradient == {block for block in masks.blocks if not masks.mask("", block).keeps_nothing}


def test_deleted_model_is_freed():
    model = dropped(tower())
    optimizer = sgd(model)
    step(model, optimizer)
    dead = [weakref.ref(module) for module in model.modules()]
    del model, optimizer
    gc.collect()
    assert not any(reference() for reference in dead)
