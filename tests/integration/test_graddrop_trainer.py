"""GradDrop in transformers' Trainer: what moves in each step, and what the log says of it."""

import pytest
import torch
from graddrop_trainer_tools import (
    EPOCHS,
    STEPS_IN_EPOCH,
    VARIANTS,
    Record,
    assert_moves_what_it_keeps,
    graddrop,
    keeps,
    masked_names,
    share,
    trained,
    trainer,
)
from peft import get_peft_model
from tiny import bert, rows
from transformers import TrainerCallback

from peft_sparsegrad import GradDropCallback, GradDropConfig


@pytest.mark.parametrize("variant", VARIANTS)
def test_masks_are_those_of_the_step_and_the_epoch_and_micro_batches_share_them(tmp_path, variant):
    model, record = graddrop(variant, frozen="hold"), Record()
    trainer(model, tmp_path, [record, GradDropCallback()]).train()
    assert record.epochs == [epoch for epoch in range(EPOCHS) for _ in range(STEPS_IN_EPOCH)]
    config = model.peft_config["default"]
    assert_moves_what_it_keeps(model, config, record)
    assert len(record.gradients) == 7 * EPOCHS
    for step, gradients in record.gradients:
        for name, kept in keeps(model, config, step, record.epochs[step]).items():
            assert not gradients[name][~kept].any(), (step, name)


@pytest.mark.parametrize("variant", ["GradDrop", "Anneal-GradDrop"])
def test_gradients_are_masked_and_momentum_moves_what_they_leave(tmp_path, variant):
    model, record = graddrop(variant), Record()
    trainer(model, tmp_path, [record, GradDropCallback()]).train()
    for step, gradients in record.gradients:
        for name, kept in keeps(model, model.peft_config["default"], step, record.epochs[step]).items():
            assert not gradients[name][~kept].any(), (step, name)
            assert gradients[name][kept].count_nonzero() >= 0.99 * kept.sum()
    assert share(record.moved[-1], record.moved[-1]) > 0.99


@pytest.mark.parametrize(
    ("variant", "rates", "moved"),
    [
        ("GradDrop", [0.2, 0.2, 0.2], None),
        ("Layer-GradDrop", [0.2, 0.2, 0.2], None),
        ("Anneal-GradDrop", [0.9, 0.45, 0.0], None),
        ("GradDrop-Epoch", [2 / 3, 1 / 3, 0.0], [1 / 3, 2 / 3, 1]),
        ("GradDrop-Epoch-Toggle", [2 / 3, 2 / 3, 2 / 3], [1 / 3, 2 / 3, 1]),
        ("GradFreeze-TopDown", [2 / 3, 1 / 3, 0.0], [1 / 3, 2 / 3, 1]),
    ],
)
def test_log_says_how_much_is_dropped_trains_and_has_moved(tmp_path, variant, rates, moved):
    counted = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            deltas = trained(model)
            counted.append(share({name: delta != 0 for name, delta in deltas.items()}, deltas))

    model = graddrop(variant)
    run = trainer(model, tmp_path, [Count(), GradDropCallback()])
    run.train()
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["graddrop_rate"] for entry in entries] == pytest.approx(rates)
    assert [entry["graddrop_moved"] for entry in entries] == pytest.approx(counted[STEPS_IN_EPOCH - 1 :: 4])
    if moved is not None:
        assert [entry["graddrop_moved"] for entry in entries] == pytest.approx(moved, abs=0.01)
    for epoch, entry in enumerate(entries):
        keep = keeps(model, model.peft_config["default"], STEPS_IN_EPOCH * (epoch + 1) - 1, epoch)
        assert entry["graddrop_active"] == pytest.approx(share(keep, keep), abs=0.01)


@pytest.mark.parametrize(
    ("variant", "reentrant"),
    [
        ("GradDrop", False),
        pytest.param("Layer-GradDrop", False, marks=pytest.mark.slow),
        ("Layer-GradDrop", True),
        pytest.param("GradDrop-Epoch", True, marks=pytest.mark.slow),
    ],
)
def test_gradient_checkpointing_changes_nothing(tmp_path, variant, reentrant):
    def run(**settings):
        model = graddrop(variant)
        trainer(model, tmp_path, [GradDropCallback()], num_train_epochs=2, **settings).train()
        return trained(model)

    plain = run()
    again = run(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert all(torch.allclose(plain[name], again[name], atol=1e-6) for name in plain)


@pytest.mark.parametrize("variant", ["GradDrop", "Layer-GradDrop"])
def test_masks_hold_under_bf16_autocast(tmp_path, variant):
    model, record = graddrop(variant, frozen="hold"), Record()
    trainer(model, tmp_path, [record, GradDropCallback()], bf16=True).train()
    assert_moves_what_it_keeps(model, model.peft_config["default"], record)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("GradDrop", {"frozen": "hold"}),
        ("Layer-GradDrop", {}),
        pytest.param("GradDrop", {}, marks=pytest.mark.slow),
        pytest.param("Layer-GradDrop", {"frozen": "hold"}, marks=pytest.mark.slow),
    ],
)
def test_nothing_called_draws_a_mask_for_every_optimizer_step(tmp_path, variant, settings):
    model, record = graddrop(variant, p=0.5, **settings), Record()
    run = trainer(model, tmp_path, [record], num_train_epochs=6)
    run.train()
    config = model.peft_config["default"]
    for step, gradients in record.gradients:
        for name, kept in keeps(model, config, step, 0).items():
            assert not gradients[name][~kept].any(), (step, name)
    if config.frozen == "hold":
        assert_moves_what_it_keeps(model, config, record)
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1


def test_task_head_trains_unmasked_and_embeddings_do_not_train(tmp_path):
    labelled = [{"input_ids": row["input_ids"], "labels": row["input_ids"][0] % 2} for row in rows(28)]
    config = GradDropConfig.from_variant("GradDrop-Epoch-Toggle", task_type="SEQ_CLS")
    model, record = get_peft_model(bert(), config), Record()
    trainer(model, tmp_path, [record, GradDropCallback()], dataset=labelled).train()
    assert_moves_what_it_keeps(model, config, record)
    head = set(trained(model)) - set(masked_names(model))
    assert len(head) == 2
    assert all("classifier" in name and moved[name].all() for moved in record.moved for name in head)
