"""`GradDropCallback` on models trained in full, by LoRA and by SparseGrad."""

import itertools

import pytest
from graddrop_trainer_tools import (
    MASKED,
    OTHERS,
    Record,
    assert_moves_what_it_keeps,
    callbacks_for,
    keeps,
    masked_names,
    often,
    other,
    share,
    trained,
    trainer,
)
from tiny import adapted

from peft_sparsegrad import GradDropCallback, GradDropConfig, create_sparsegrad_optimizer

EACH_ONCE = [
    ("full", "GradDrop"), ("lora", "Layer-GradDrop"), ("sparsegrad", "GradDrop-Epoch"),
    ("sparsegrad, warm-up", "GradDrop"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "variant"),
    often(list(itertools.product(OTHERS, ["GradDrop", "Layer-GradDrop", "GradDrop-Epoch"])), EACH_ONCE),
)
def test_masks_all_that_trains_in_the_blocks_of_another_model_and_nothing_else(tmp_path, name, variant):
    model, record = other(name), Record()
    settings = {**MASKED, "scale": None} if variant != "GradDrop-Epoch" else {}
    config = GradDropConfig.from_variant(variant, **settings)
    run = trainer(model, tmp_path, [*callbacks_for(name, config), record])
    run.train()
    assert_moves_what_it_keeps(model, config, record)
    unmasked = set(trained(model)) - set(masked_names(model))
    assert bool(unmasked) == (name == "full")
    assert all(moved[name].float().mean() > 0.95 for moved in record.moved for name in unmasked)
    assert all(entry["graddrop_moved"] > 0.2 for entry in run.state.log_history if "loss" in entry)


def test_masks_the_values_of_a_dynamic_support(tmp_path):
    model, record = adapted(support="dynamic", density=0.3), Record()
    config = GradDropConfig(**MASKED)
    run = trainer(model, tmp_path, [GradDropCallback(config), record])
    run.optimizer = create_sparsegrad_optimizer(model, lr=1e-2)
    run.train()
    for step, moved in enumerate(record.moved):
        keep = keeps(model, config, step, epoch=0)
        assert 0 < share(moved, keep) <= share(keep, keep)
        assert not any((moved[name] & ~kept).any() for name, kept in keep.items())


def test_two_callbacks_on_the_same_parameters_are_refused(tmp_path):
    callbacks = [GradDropCallback(GradDropConfig(seed=seed)) for seed in (0, 1)]
    with pytest.raises(ValueError, match="two `GradDropCallback`s mask the same parameters"):
        trainer(other("full"), tmp_path, callbacks).train()
