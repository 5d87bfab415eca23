"""Which entries move in training, held to the paper's description of each variant."""

import pytest
import torch
from graddrop_tools import (
    LAYERWISE_SETS,
    deltas,
    dropped,
    graddrop_layers,
    loss_of,
    masks_of,
    moved_in_a_step,
    sgd,
    tower,
)

from peft_sparsegrad import GradDrop, GradDropConfig
from peft_sparsegrad.functional.streams import draws, stream_key
from peft_sparsegrad.graddrop.variants import VARIANTS


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
        masks.progress.set_step(number)
        kept += sum(masks.trains("", block) for block in masks.blocks)
    assert abs(kept - 2000 * 0.7) < 5 * (2000 * 0.3 * 0.7) ** 0.5


def test_whole_blocks_are_dropped_independently_of_each_other():
    masks = masks_of(dropped(tower(num_blocks=2), "Layer-GradDrop", p=0.5))
    seen = set()
    for number in range(40):
        masks.progress.set_step(number)
        seen.add(tuple(masks.trains("", block) for block in masks.blocks))
    assert len(seen) == 4


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
