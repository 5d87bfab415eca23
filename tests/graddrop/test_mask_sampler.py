"""Which entries move in training, held to the paper's description of each variant.

The networks are such that no gradient is zero by itself, so under SGD an entry moves if and only if it is not masked.
"""

import copy

import pytest
import torch
from block_models import t5
from graddrop_tools import adamw, deltas, dropped, graddrop_layers, loss_of, masks_of, sgd, step, tower
from torch import nn

from peft_sparsegrad import GradDrop, GradDropConfig
from peft_sparsegrad.functional.streams import draws, stream_key
from peft_sparsegrad.graddrop.mask_sampler import MaskSampler
from peft_sparsegrad.graddrop.variants import VARIANTS

RATES = {
    # epochs, and the announced rate in each
    ("linear", 0.9, 10): [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0],
    ("linear", 0.9, 4): [0.9, 0.6, 0.3, 0.0],
    ("linear", 0.5, 2): [0.5, 0.0],
    ("linear-paper", 0.9, 10): [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0],
    ("linear-paper", 0.9, 3): [0.9, 0.9 - 1 / 3, 0.9 - 2 / 3],
    ("linear-paper", 0.5, 4): [0.5, 0.25, 0.0, 0.0],
    ("exponential", 0.8, 3): [0.8, 0.08, 0.008],
}


def uniform(key, shape) -> torch.Tensor:
    """One number in [0, 65536) for each entry."""
    count = torch.Size(shape).numel()
    return (draws(key, count).long() + 32768).view(shape)


def kept_by_paper(config: GradDropConfig, name, shape, block, blocks, step, epoch, num_epochs, rate) -> torch.Tensor:
    """The entries that the variant trains, from its description in section III and section IV's baselines."""
    everything = torch.ones(shape, dtype=torch.bool)
    if config.selection == "bernoulli":
        now = step if config.interval == "step" else epoch
        unit = name if config.granularity == "element" else block
        key = stream_key(config.seed, config.interval, now, unit)
        if config.granularity == "layer":
            return everything if key.first % 65536 >= round(rate * 65536) else ~everything
        return uniform(key, shape) >= round(rate * 65536)
    if config.granularity == "element":
        chunk = uniform(stream_key(config.seed, "sets", name), shape) * num_epochs // 65536
        return chunk == epoch if config.toggle else chunk <= epoch
    order = list(blocks)
    if config.selection == "top-down":
        order = order[::-1]
    elif config.selection == "without-replacement":
        order = sorted(blocks, key=lambda b: stream_key(config.seed, "order of layers", blocks.index(b)))
    groups = [[] for _ in range(num_epochs)]
    for position, one in enumerate(order):
        groups[position * num_epochs // len(order)].append(one)
    active = groups[epoch] if config.toggle else [one for group in groups[: epoch + 1] for one in group]
    return everything if block in active else ~everything


def rate_of(config, epoch, num_epochs):
    if config.schedule == "linear":
        return config.p * (num_epochs - 1 - epoch) / (num_epochs - 1)
    return config.p


def moved_in_a_step(model, optimizer, seed=0) -> dict[str, torch.Tensor]:
    before = {name: delta.detach().clone() for name, delta in deltas(model).items()}
    step(model, optimizer, seed)
    return {name: delta.detach() != before[name] for name, delta in deltas(model).items()}


LAYERWISE_SETS = {"granularity": "layer", "interval": "epoch", "selection": "without-replacement"}
CASES = {
    **{name: {"variant": name} for name in VARIANTS},
    "layer sets": LAYERWISE_SETS,
    "layer sets, toggle": {**LAYERWISE_SETS, "toggle": True},
    "GradFreeze-Toggle-BottomUp": {**LAYERWISE_SETS, "selection": "bottom-up", "toggle": True},
    "layers, drawn each epoch": {"granularity": "layer", "interval": "epoch", "p": 0.5},
    "annealed by the epoch": {"interval": "epoch", "schedule": "linear", "p": 0.9},
    "another seed": {"seed": 12345},
    "held": {"frozen": "hold"},
}


@pytest.mark.parametrize("num_epochs", [3, 5])
@pytest.mark.parametrize("case", CASES)
def test_entries_that_move_are_those_of_the_paper(case, num_epochs):
    model = dropped(tower(num_blocks=5), **CASES[case], num_epochs=num_epochs)
    config, layers = masks_of(model).config, graddrop_layers(model)
    blocks = [f"layers.{i}" for i in range(5)]
    graddrop, optimizer, number = GradDrop(model), sgd(model), 0
    for epoch in range(num_epochs):
        graddrop.set_epoch(epoch)
        for _ in range(2):
            for name, moved in moved_in_a_step(model, optimizer, number).items():
                block = layers[name.rpartition(".")[0]].graddrop_block
                rate = rate_of(config, epoch, num_epochs)
                kept = kept_by_paper(config, name, moved.shape, block, blocks, number, epoch, num_epochs, rate)
                assert torch.equal(moved, kept), (name, epoch, number)
            number += 1


def test_scale_is_that_of_equation_4():
    scaled, unscaled = dropped(tower(), p=0.25), dropped(tower(), p=0.25, scale=False)
    for model in (scaled, unscaled):
        loss_of(model).backward()
    for name, delta in deltas(unscaled).items():
        assert torch.allclose(deltas(scaled)[name].grad, delta.grad / (1 - 0.25))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_of_kept_entries_is_within_binomial_bounds(p):
    model = dropped(tower(num_blocks=2, size=8), p=p, seed=3)
    count = sum(delta.numel() for delta in deltas(model).values())
    optimizer = sgd(model)
    kept = sum(int(moved.sum()) for s in range(5) for moved in moved_in_a_step(model, optimizer, s).values())
    bound = 5 * (5 * count * p * (1 - p)) ** 0.5
    assert abs(kept - 5 * count * (1 - p)) < bound


def test_share_of_kept_layers_is_within_binomial_bounds():
    masks = masks_of(dropped(tower(num_blocks=4), "Layer-GradDrop", p=0.3))
    kept = 0
    for number in range(500):
        masks.set_step(number)
        kept += sum(masks.trains("", block) for block in masks.blocks)
    assert abs(kept - 2000 * 0.7) < 5 * (2000 * 0.3 * 0.7) ** 0.5


def test_whole_blocks_are_dropped_independently_of_each_other():
    masks = masks_of(dropped(tower(num_blocks=2), "Layer-GradDrop", p=0.5))
    seen = set()
    for number in range(40):
        masks.set_step(number)
        seen.add(tuple(masks.trains("", block) for block in masks.blocks))
    assert len(seen) == 4


@pytest.mark.parametrize("num_epochs", [2, 3, 7])
@pytest.mark.parametrize("granularity", ["element", "layer"])
def test_sets_are_disjoint_and_exhaustive_and_even(num_epochs, granularity):
    settings = {**LAYERWISE_SETS, "granularity": granularity, "toggle": True, "num_epochs": num_epochs}
    model = dropped(tower(num_blocks=7), **settings)
    graddrop, optimizer = GradDrop(model), sgd(model)
    times, sizes = {name: torch.zeros(delta.shape) for name, delta in deltas(model).items()}, []
    for epoch in range(num_epochs):
        graddrop.set_epoch(epoch)
        moved = moved_in_a_step(model, optimizer, epoch)
        sizes.append(sum(int(entries.sum()) for entries in moved.values()))
        for name, entries in moved.items():
            times[name] += entries
    assert all((count == 1).all() for count in times.values())
    assert max(sizes) <= (2.1 if granularity == "layer" else 1.2) * min(sizes)


def test_epoch_variant_without_toggle_trains_everything_in_the_last_epoch_and_never_less_than_before():
    model = dropped(tower(), "GradDrop-Epoch", num_epochs=4)
    graddrop, optimizer = GradDrop(model), sgd(model)
    before = None
    for epoch in range(4):
        graddrop.set_epoch(epoch)
        moved = torch.cat([entries.flatten() for entries in moved_in_a_step(model, optimizer, epoch).values()])
        assert abs(moved.double().mean() - (epoch + 1) / 4) < 0.05
        assert before is None or (before <= moved).all()
        before = moved
    assert before.all()


def test_reset_variant_draws_anew_in_each_epoch_and_stays_within_one():
    model = dropped(tower(), "GradDrop-Epoch-Reset", p=0.5)
    graddrop, optimizer, seen = GradDrop(model), sgd(model), []
    for epoch in (0, 0, 1, 1):
        graddrop.set_epoch(epoch)
        seen.append(torch.cat([m.flatten() for m in moved_in_a_step(model, optimizer, len(seen)).values()]))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])
    assert 0.4 < (seen[0] == seen[2]).double().mean() < 0.6


ORDERS = {
    ("top-down", 3): [[11, 10, 9, 8], [7, 6, 5, 4], [3, 2, 1, 0]],
    ("bottom-up", 3): [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]],
    ("top-down", 5): [[11, 10, 9], [8, 7], [6, 5, 4], [3, 2], [1, 0]],
    ("bottom-up", 5): [[0, 1, 2], [3, 4], [5, 6, 7], [8, 9], [10, 11]],
    ("top-down", 12): [[i] for i in range(11, -1, -1)],
    ("bottom-up", 12): [[i] for i in range(12)],
}


@pytest.mark.parametrize("toggle", [False, True])
@pytest.mark.parametrize(("selection", "num_epochs"), ORDERS)
def test_ordered_unfreezing_of_twelve_blocks(selection, num_epochs, toggle):
    settings = {**LAYERWISE_SETS, "selection": selection, "toggle": toggle, "num_epochs": num_epochs}
    model = dropped(tower(num_blocks=12), **settings)
    graddrop, optimizer = GradDrop(model), sgd(model, lr=1e-4)
    active = []
    for epoch, added in enumerate(ORDERS[selection, num_epochs]):
        graddrop.set_epoch(epoch)
        active = added if toggle else active + added
        moved = moved_in_a_step(model, optimizer)
        for name, entries in moved.items():
            assert bool(entries.all()) is bool(entries.any()) is (int(name.split(".")[1]) in active)


@pytest.mark.parametrize(
    ("settings", "epochs", "rates"),
    [
        ({"selection": "top-down"}, [[11, 10], [11, 10, 9, 8], [11, 10, 9, 8, 7, 6]], [10 / 12, 8 / 12, 6 / 12]),
        ({"selection": "bottom-up"}, [[0, 1], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5]], [10 / 12, 8 / 12, 6 / 12]),
        ({"selection": "top-down", "toggle": True}, [[11, 10], [9, 8], [7, 6]], [10 / 12] * 3),
    ],
    ids=str,
)
def test_given_number_of_blocks_an_epoch_leaves_the_rest_frozen(settings, epochs, rates):
    """The paper's best GradFreeze: 3 epochs, after which 6 of the blocks have trained."""
    model = dropped(tower(num_blocks=12), **{**LAYERWISE_SETS, **settings, "blocks_per_epoch": 2, "num_epochs": 3})
    graddrop, optimizer = GradDrop(model), sgd(model, lr=1e-4)
    for epoch, active in enumerate(epochs):
        graddrop.set_epoch(epoch)
        assert masks_of(model).rate == pytest.approx(rates[epoch])
        for name, entries in moved_in_a_step(model, optimizer).items():
            assert bool(entries.all()) is bool(entries.any()) is (int(name.split(".")[1]) in active)


def test_more_epochs_than_blocks_to_add_train_all_blocks():
    model = dropped(tower(num_blocks=3), "GradFreeze-TopDown", blocks_per_epoch=2, num_epochs=4)
    graddrop, masks = GradDrop(model), masks_of(model)
    trained = []
    for epoch in range(4):
        graddrop.set_epoch(epoch)
        trained.append([block for block in masks.blocks if masks.trains("", block)])
    assert [len(blocks) for blocks in trained] == [2, 3, 3, 3]
    with pytest.raises(ValueError, match="3 epochs and 3 blocks, 2 an epoch, would train no block at all"):
        GradDrop(dropped(tower(num_blocks=3), "GradFreeze-Toggle-TopDown", blocks_per_epoch=2, num_epochs=3))


def test_ordered_unfreezing_goes_from_the_encoders_input_to_the_decoders_output():
    model = dropped(t5(), "GradFreeze-BottomUp", num_epochs=4)
    graddrop, masks = GradDrop(model), masks_of(model)
    seen = []
    for epoch in range(4):
        graddrop.set_epoch(epoch)
        seen.append([block for block in masks.blocks if masks.trains("", block)])
    assert seen[0] == ["encoder.block.0"]
    assert seen[2] == ["encoder.block.0", "encoder.block.1", "decoder.block.0"]


@pytest.mark.parametrize(("schedule", "p", "num_epochs"), RATES)
def test_annealed_rates(schedule, p, num_epochs):
    model = dropped(tower(), "Anneal-GradDrop", schedule=schedule, p=p, num_epochs=num_epochs)
    graddrop, optimizer = GradDrop(model), sgd(model, lr=1e-3)
    for epoch, rate in enumerate(RATES[schedule, p, num_epochs]):
        graddrop.set_epoch(epoch)
        assert masks_of(model).rate == pytest.approx(rate, abs=1e-12)
        moved = torch.cat([entries.flatten() for entries in moved_in_a_step(model, optimizer, epoch).values()])
        assert moved.double().mean() == pytest.approx(1 - rate, abs=5 * (rate * (1 - rate) / len(moved)) ** 0.5 + 1e-4)


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"variant": "GradDrop-Epoch"}, [0.75, 0.5, 0.25, 0.0]),
        ({"variant": "GradDrop-Epoch-Toggle"}, [0.75] * 4),
        ({"variant": "GradFreeze-TopDown"}, [0.75, 0.5, 0.25, 0.0]),
        ({"variant": "GradDrop-Epoch-Reset"}, [0.2] * 4),
        ({"variant": "Layer-GradDrop"}, [0.2] * 4),
    ],
    ids=str,
)
def test_rate_of_sets_and_of_constant_schedules(settings, rates):
    model = dropped(tower(num_blocks=4), **settings, num_epochs=4)
    graddrop = GradDrop(model)
    for epoch, rate in enumerate(rates):
        graddrop.set_epoch(epoch)
        assert masks_of(model).rate == pytest.approx(rate)


# When a mask changes


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
    assert masks_of(model).step == 1


def test_two_optimizers_of_one_model_count_a_step_once():
    model = dropped(tower())
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizers = [torch.optim.SGD(parameters[:5], lr=0.01), torch.optim.AdamW(parameters[5:], lr=0.01)]
    for number in range(3):
        loss_of(model, number).backward()
        assert masks_of(model).step == number
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert masks_of(model).step == 2


def test_optimizer_step_that_the_loss_scale_skips_is_not_counted():
    model = dropped(tower())
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=2.0)
    for number in range(3):
        loss = loss_of(model, number)
        scaler.scale(loss * float("inf") if number == 1 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert masks_of(model).step == 1


def test_step_of_another_models_optimizer_is_not_counted():
    model, other = dropped(tower()), dropped(tower())
    optimizer = sgd(other)
    for seed in range(3):
        step(other, optimizer, seed)
        loss_of(model).backward()
    assert (masks_of(model).step, masks_of(other).step) == (0, 2)


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
    assert masks_of(model).step == 19  # the next begins with the next pass


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
    assert masks_of(model).step == 5


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


# What a mask depends on


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
            one.set_step(number)
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


# Gaussian noise


@pytest.mark.parametrize("granularity", ["element", "layer"])
def test_gaussian_noise_has_mean_one_and_the_variance_of_a_scaled_mask(granularity):
    model = dropped(tower(num_blocks=12), noise="gaussian", granularity=granularity, p=0.2, seed=5)
    plain = dropped(tower(num_blocks=12), p=0.0)
    loss_of(plain).backward()
    graddrop, factors = GradDrop(model), []
    for number in range(20):
        graddrop.set_step(number)
        model.zero_grad()
        loss_of(model).backward()
        ratio = {name: delta.grad / deltas(plain)[name].grad for name, delta in deltas(model).items()}
        if granularity == "layer":
            for block in masks_of(model).blocks:
                own = torch.cat([values.flatten() for name, values in ratio.items() if name.startswith(f"{block}.")])
                assert torch.allclose(own, own[0], rtol=1e-6)
                factors.append(own[0])
        else:
            factors += [values.flatten()[:8] for values in ratio.values()]
    factors = torch.stack(factors) if granularity == "layer" else torch.cat(factors)
    assert factors.mean() == pytest.approx(1.0, abs=5 * (0.25 / len(factors)) ** 0.5)
    assert factors.var() == pytest.approx(0.25, rel=5 * (2 / len(factors)) ** 0.5)


# What is not known


EPOCHS = ["GradDrop-Epoch", "GradDrop-Epoch-Reset", "GradFreeze-TopDown", "Anneal-GradDrop", "Anneal-Layer-GradDrop"]


@pytest.mark.parametrize("variant", EPOCHS)
def test_epoch_never_announced_is_an_error_at_the_first_backward_pass(variant):
    model = dropped(tower(), variant, num_epochs=3)
    loss = loss_of(model)
    with pytest.raises(RuntimeError, match="no epoch was announced: give the Trainer a `GradDropCallback`"):
        loss.backward()


def test_epoch_never_announced_names_the_settings():
    model = dropped(tower(), "Anneal-GradDrop", num_epochs=3)
    with pytest.raises(RuntimeError, match="interval='step' and schedule='linear' depends on the epoch"):
        loss_of(model).backward()


def test_epoch_never_announced_on_other_parameters_is_an_error_too():
    model = tower()
    GradDrop(model, GradDropConfig.from_variant("GradDrop-Epoch", num_epochs=3))
    with pytest.raises(RuntimeError, match=r"call `set_epoch\(epoch\)` of the `GradDrop` object"):
        loss_of(model).backward()


@pytest.mark.parametrize("variant", EPOCHS[:1] + EPOCHS[2:])
@pytest.mark.parametrize("epoch", [-1, 3, 100])
def test_epoch_out_of_range(variant, epoch):
    graddrop = GradDrop(dropped(tower(), variant, num_epochs=3))
    with pytest.raises(ValueError, match=rf"`epoch` must be in \[0, 3\), as `num_epochs` says, not {epoch}"):
        graddrop.set_epoch(epoch)


@pytest.mark.parametrize("variant", EPOCHS[:1] + EPOCHS[2:])
def test_number_of_epochs_unknown(variant):
    model = dropped(tower(), variant)
    with pytest.raises(ValueError, match="`num_epochs` is not known"):
        GradDrop(model).set_epoch(0)
    GradDrop(model, num_epochs=2).set_epoch(1)


def test_reset_variant_needs_no_number_of_epochs():
    model = dropped(tower(), "GradDrop-Epoch-Reset")
    GradDrop(model).set_epoch(99)
    step(model, sgd(model))


def test_number_of_epochs_in_conflict():
    model = dropped(tower(), "GradDrop-Epoch", num_epochs=3)
    with pytest.raises(
        ValueError, match=r"`num_epochs` is 3 in the GradDrop configuration, but the number of epochs of the run is 4"
    ):
        GradDrop(model, num_epochs=4)
    GradDrop(model, num_epochs=3)


@pytest.mark.parametrize("when", ["config", "run"])
def test_toggle_with_more_epochs_than_layers(when):
    message = "`toggle` with 4 epochs and 3 blocks would train no block at all"
    if when == "config":
        with pytest.raises(ValueError, match=message):
            dropped(tower(), "GradFreeze-Toggle-TopDown", num_epochs=4)
    else:
        model = dropped(tower(), "GradFreeze-Toggle-TopDown")
        with pytest.raises(ValueError, match=message):
            GradDrop(model, num_epochs=4)


def test_toggle_with_as_many_epochs_as_layers_and_without_toggle_more():
    dropped(tower(), "GradFreeze-Toggle-TopDown", num_epochs=3)
    dropped(tower(), "GradFreeze-TopDown", num_epochs=4)
    dropped(tower(), "GradDrop-Epoch-Toggle", num_epochs=4)


def test_toggle_with_too_many_epochs_leaves_the_model_alone():
    base = tower()
    with pytest.raises(ValueError, match="`toggle`"):
        dropped(base, "GradFreeze-Toggle-TopDown", num_epochs=4)
    assert not graddrop_layers(base)
    assert all(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize("schedule", ["linear", "linear-paper", "exponential"])
def test_annealing_over_one_epoch(schedule):
    model = dropped(tower(), "Anneal-GradDrop", schedule=schedule)
    with pytest.raises(ValueError, match="changes what trains from epoch to epoch and needs at least 2"):
        GradDrop(model, num_epochs=1)


def test_loss_of_a_copy_is_not_advanced_by_masks():
    model = dropped(tower(), p=0.5)
    assert torch.equal(loss_of(copy.deepcopy(model)), loss_of(model))


@pytest.mark.parametrize("variant", ["GradDrop-Epoch", "GradDrop-Epoch-Toggle", "GradDrop-Epoch-Reset"])
def test_masks_of_an_epoch_are_remembered_for_that_epoch_only(variant):
    masks = MaskSampler(GradDropConfig.from_variant(variant, num_epochs=3), ["block"])
    shape, kept = torch.Size([1000]), []
    for epoch in (0, 0, 1, 0):
        masks.set_epoch(epoch)
        kept.append(masks.mask("w", "block").keep(shape, torch.device("cpu")))
        assert masks.mask("w", "block") is masks.mask("w", "block")
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], kept[3])
    assert not torch.equal(kept[0], kept[2])
