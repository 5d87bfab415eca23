"""What trains in each epoch: sets, unfreezing in order, and annealed rates."""

import pytest
import torch
from block_models import t5
from graddrop_tools import LAYERWISE_SETS, deltas, dropped, masks_of, moved_in_a_step, sgd, tower

from peft_sparsegrad import GradDrop, GradDropConfig
from peft_sparsegrad.graddrop.mask_sampler import MaskSampler

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
