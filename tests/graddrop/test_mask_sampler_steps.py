"""When a mask changes: with each optimizer step that was taken, and not between them."""

import pytest
import torch
from graddrop_tools import adamw, deltas, dropped, loss_of, masks_of, moved_in_a_step, sgd, step, tower

from peft_sparsegrad import GradDrop


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("variant", ["GradDrop", "Layer-GradDrop"])
def test_micro_batches_of_a_step_share_a_mask_and_the_next_step_has_another(make, variant):
    model = dropped(tower(num_blocks=8), variant, p=0.5)
    optimizer, seen = make(model), []
    for number in range(3):
        for micro in range(3):
            before = {name: 0.0 if d.grad is None else d.grad.clone() for name, d in deltas(model).items()}
            loss_of(model, 3 * number + micro).backward()
            now = {name: torch.zeros_like(d) if d.grad is None else d.grad for name, d in deltas(model).items()}
            seen.append(torch.cat([(now[name] - before[name] != 0).flatten() for name in now]))
        optimizer.step()
        optimizer.zero_grad()
    steps = [seen[i : i + 3] for i in (0, 3, 6)]
    assert all(torch.equal(micro, group[0]) for group in steps for micro in group)
    assert not torch.equal(steps[0][0], steps[1][0])
    assert not torch.equal(steps[1][0], steps[2][0])


def test_evaluation_between_steps_does_not_advance_the_mask():
    model, plain = dropped(tower()), dropped(tower())
    optimizers = {id(which): sgd(which) for which in (model, plain)}
    for seed in range(4):
        for which in (model, plain):
            step(which, optimizers[id(which)], seed)
        model.eval()
        with torch.no_grad():
            loss_of(model)
        loss_of(model)  # without no_grad, and never followed by a backward pass
        model.train()
    assert all(torch.equal(deltas(model)[name], delta) for name, delta in deltas(plain).items())


def test_evaluation_between_micro_batches_does_not_advance_the_mask():
    model = dropped(tower())
    optimizer = sgd(model)
    step(model, optimizer)
    for _ in range(3):
        loss_of(model).backward()
        loss_of(model)
    assert masks_of(model).progress.step == 1


def test_two_optimizers_of_one_model_count_a_step_once():
    model = dropped(tower())
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizers = [torch.optim.SGD(parameters[:5], lr=0.01), torch.optim.AdamW(parameters[5:], lr=0.01)]
    for number in range(3):
        loss_of(model, number).backward()
        assert masks_of(model).progress.step == number
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert masks_of(model).progress.step == 2


def test_optimizer_step_that_the_loss_scale_skips_is_not_counted():
    model = dropped(tower())
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=2.0)
    for number in range(3):
        loss = loss_of(model, number)
        scaler.scale(loss * float("inf") if number == 1 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert masks_of(model).progress.step == 1


def test_step_of_another_models_optimizer_is_not_counted():
    model, other = dropped(tower()), dropped(tower())
    optimizer = sgd(other)
    for seed in range(3):
        step(other, optimizer, seed)
        loss_of(model).backward()
    assert (masks_of(model).progress.step, masks_of(other).progress.step) == (0, 2)


def test_step_with_a_closure_trains_and_counts():
    model = dropped(tower(), p=0.5)
    optimizer = sgd(model)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[-1] < losses[0]
    assert masks_of(model).progress.step == 19  # the next begins with the next pass


def test_set_step_repeats_the_masks_of_an_earlier_step():
    model = dropped(tower(), p=0.5)
    optimizer = sgd(model)
    counted = [moved_in_a_step(model, optimizer, seed) for seed in range(4)]
    graddrop = GradDrop(model)
    for number in (2, 0, 3, 3, 1):
        graddrop.set_step(number)
        moved = moved_in_a_step(model, optimizer, number + 7)
        assert all(torch.equal(moved[name], counted[number][name]) for name in moved)


def test_after_set_step_steps_are_announced_and_not_counted():
    model = dropped(tower())
    GradDrop(model).set_step(5)
    optimizer = sgd(model)
    for _ in range(3):
        step(model, optimizer)
    loss_of(model)
    assert masks_of(model).progress.step == 5


def test_resumed_run_goes_on_like_the_uninterrupted_one(tmp_path):
    model = dropped(tower(), p=0.5)
    optimizer = sgd(model)
    for seed in range(3):
        step(model, optimizer, seed)
    resumed = dropped(tower(), p=0.5)
    resumed.load_state_dict(model.state_dict())
    graddrop, optimizers = GradDrop(resumed), (optimizer, sgd(resumed))
    for number in range(3, 6):
        graddrop.set_step(number)
        for which, its in zip((model, resumed), optimizers, strict=True):
            step(which, its, number)
    assert all(torch.equal(deltas(resumed)[name], delta) for name, delta in deltas(model).items())
