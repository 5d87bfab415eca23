"""After a Trainer run with GradDrop, finished or interrupted, the next has masks of its own, none, or is refused."""

import pytest
import torch
from graddrop_trainer_tools import (
    MASKED,
    OTHERS,
    STEPS_IN_EPOCH,
    Record,
    assert_moves_what_it_keeps,
    callbacks_for,
    graddrop,
    other,
    share,
    trainer,
)
from transformers import TrainerCallback

from peft_sparsegrad import GradDropCallback, GradDropConfig


def test_second_run_on_the_same_model_has_masks_of_its_own(tmp_path):
    model = graddrop("GradDrop-Epoch")
    trainer(model, tmp_path, [GradDropCallback()]).train()
    record = Record()
    trainer(model, tmp_path, [record, GradDropCallback()], num_train_epochs=2).train()
    assert_moves_what_it_keeps(model, model.peft_config["default"], record, num_epochs=2)


def test_nothing_called_after_a_run_with_the_callback_still_draws_a_mask_for_every_step(tmp_path):
    model = graddrop("GradDrop", p=0.5, frozen="hold")
    trainer(model, tmp_path, [GradDropCallback()], num_train_epochs=1).train()
    record = Record()
    trainer(model, tmp_path, [record], num_train_epochs=1).train()
    moved_in_all = {n: torch.stack([moved[n] for moved in record.moved]).any(0) for n in record.moved[0]}
    assert share(moved_in_all, moved_in_all) == pytest.approx(1 - 0.5**STEPS_IN_EPOCH, abs=0.02)


def test_variant_of_epochs_asks_for_the_callback_in_a_second_run_too(tmp_path):
    """Else it would go on with the mask of the last epoch, in which everything trains."""
    model = graddrop("GradDrop-Epoch")
    trainer(model, tmp_path, [GradDropCallback()]).train()
    with pytest.raises(RuntimeError, match="GradDropCallback"):
        trainer(model, tmp_path, num_train_epochs=1).train()


@pytest.mark.parametrize("name", OTHERS)
def test_training_leaves_no_masks_behind(tmp_path, name):
    model = other(name)
    trainer(model, tmp_path, callbacks_for(name, GradDropConfig(**MASKED)), num_train_epochs=1).train()
    assert not any(p._backward_hooks for p in model.parameters())
    record = Record()
    trainer(model, tmp_path, [record], num_train_epochs=1).train()
    assert all(share(moved, moved) > 0.99 for moved in record.moved)


def test_loss_logged_after_training_is_no_error(tmp_path):
    run = trainer(other("lora"), tmp_path, [GradDropCallback(GradDropConfig(**MASKED))], num_train_epochs=1)
    run.train()
    run.log({"loss": 1.0})


class Interrupted(Exception):
    pass


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise Interrupted


def interrupted(tmp_path, model, config) -> GradDropCallback:
    callback = GradDropCallback(config)
    with pytest.raises(Interrupted):
        trainer(model, tmp_path, [callback, Interrupt()]).train()
    return callback


@pytest.mark.parametrize("how", ["the same callback", "another callback"])
def test_interrupted_run_leaves_no_masks_to_the_next(tmp_path, how):
    model, config, record = other("full"), GradDropConfig(**MASKED), Record()
    callback = interrupted(tmp_path, model, config)
    again = callback if how == "the same callback" else GradDropCallback(config)
    trainer(model, tmp_path, [again, record], num_train_epochs=1).train()
    assert_moves_what_it_keeps(model, config, record, num_epochs=1)


def test_masks_of_an_interrupted_run_are_refused_by_a_run_without_a_callback(tmp_path):
    """Nobody tells a callback that its run is over; a step by another optimizer does."""
    model, record = other("full"), Record()
    callback = interrupted(tmp_path, model, GradDropConfig(**MASKED))
    with pytest.raises(RuntimeError, match="masked for another run"):
        trainer(model, tmp_path, num_train_epochs=1).train()
    callback.graddrop.remove()
    trainer(model, tmp_path, [record], num_train_epochs=1).train()
    assert all(share(moved, moved) > 0.99 for moved in record.moved)


def test_announcements_of_an_interrupted_run_are_refused_by_a_run_without_a_callback(tmp_path):
    model = graddrop("Layer-GradDrop")
    interrupted(tmp_path, model, None)
    with pytest.raises(RuntimeError, match="masked for another run"):
        trainer(model, tmp_path, num_train_epochs=1).train()
