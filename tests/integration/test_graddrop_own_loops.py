"""GradDrop in loops of one's own and in Accelerate: epochs, gradient scalers, accumulation."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from graddrop_trainer_tools import MASKED, keeps, share, trained
from peft import get_peft_model
from tiny import batch, llama

from peft_sparsegrad import GradDrop, GradDropConfig


def model_and_masks(kind, variant, **overrides):
    """A model, with the adapter or else trained in full, with its configuration and its `GradDrop`."""
    config = GradDropConfig.from_variant(variant, **overrides)
    model = get_peft_model(llama(), config) if kind == "adapter" else llama()
    return model, config, GradDrop(model, None if kind == "adapter" else config)


def moved_by(model, step):
    before = trained(model)
    step()
    return {name: value != before[name] for name, value in trained(model).items()}


def assert_moved(moved, keep):
    assert not any((moved[name] & ~kept).any() for name, kept in keep.items())
    assert share(moved, keep) >= 0.99 * share(keep, keep)


KINDS = pytest.mark.parametrize("kind", ["adapter", "full"])


@KINDS
@pytest.mark.parametrize("variant", ["GradDrop-Epoch", "GradDrop-Epoch-Toggle", "GradFreeze-TopDown"])
def test_two_lines_in_a_loop_of_ones_own(kind, variant):
    model, config, graddrop = model_and_masks(kind, variant, num_epochs=3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
    for epoch in range(3):
        graddrop.set_epoch(epoch)
        for step in range(2):
            model(**batch(step)).loss.backward()
            moved = moved_by(model, optimizer.step)
            optimizer.zero_grad()
            assert_moved(moved, keeps(model, config, 0, epoch))


@KINDS
@pytest.mark.parametrize("settings", [("GradDrop", MASKED), ("Layer-GradDrop", {"p": 0.5, "seed": 4})])
def test_step_that_the_gradient_scaler_skips_does_not_advance_the_mask(kind, settings):
    model, config, graddrop = model_and_masks(kind, settings[0], **settings[1])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38, backoff_factor=1e-36)
    for step in [None, 0, 1]:  # the first overflows
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch()).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        moved = moved_by(model, lambda: scaler.step(optimizer))
        scaler.update()
        optimizer.zero_grad()
        if step is None:
            assert not any(entries.any() for entries in moved.values())
        else:
            assert_moved(moved, keeps(model, config, step, 0, num_epochs=1))
        assert graddrop.samplers[0].progress.step == (step or 0)


@KINDS
def test_gradient_scaler_takes_a_step_in_which_all_layers_are_masked(kind):
    model, config, _ = model_and_masks(kind, "Layer-GradDrop", p=0.99)
    assert not any(kept.any() for kept in keeps(model, config, 0, 0, num_epochs=1).values())
    blocks = [p for name, p in model.named_parameters() if p.requires_grad and "layers" in name]
    optimizer = torch.optim.AdamW(blocks, lr=1e-3)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(**batch()).loss).backward()
    moved = moved_by(model, lambda: scaler.step(optimizer))
    scaler.update()
    assert not any(entries.any() for entries in moved.values())


@KINDS
@pytest.mark.parametrize("settings", [("GradDrop", MASKED), ("Layer-GradDrop", {"p": 0.5, "seed": 4})])
def test_accelerate_with_accumulation_draws_one_mask_per_optimizer_step(kind, settings):
    AcceleratorState._reset_state(True)
    model, config, _ = model_and_masks(kind, settings[0], **settings[1])
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loader = torch.utils.data.DataLoader([{k: v[0] for k, v in batch(n).items()} for n in range(12)], batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for number, inputs in enumerate(loader):
        with accelerator.accumulate(model):
            accelerator.backward(model(**inputs).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            moved = moved_by(model, optimizer.step)
            optimizer.zero_grad()
        if number % 2:
            assert_moved(moved, keeps(model, config, number // 2, 0, num_epochs=1))
        else:
            assert not any(entries.any() for entries in moved.values())
