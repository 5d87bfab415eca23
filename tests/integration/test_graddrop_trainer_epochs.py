"""The epochs that the Trainer announces to GradDrop, also of streams, and those it cannot know."""

import pytest
from graddrop_trainer_tools import Record, assert_moves_what_it_keeps, equal, graddrop, trained, trainer
from tiny import rows
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from peft_sparsegrad import GradDropCallback, GradDropLayer


def test_epochs_are_those_of_a_run_of_max_steps(tmp_path):
    model, record = graddrop("GradDrop-Epoch"), Record()
    trainer(model, tmp_path, [record, GradDropCallback()], max_steps=10).train()
    assert record.epochs == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert_moves_what_it_keeps(model, model.peft_config["default"], record)


def test_part_of_an_epoch_counts_as_one(tmp_path):
    model, record = graddrop("GradFreeze-TopDown"), Record()
    trainer(model, tmp_path, [record, GradDropCallback()], num_train_epochs=1.5).train()
    assert record.epochs == [0, 0, 0, 0, 1, 1]
    assert_moves_what_it_keeps(model, model.peft_config["default"], record, num_epochs=2)


def test_number_of_epochs_in_conflict_with_the_configuration_is_refused_before_training(tmp_path):
    model = graddrop("GradDrop-Epoch", num_epochs=5)
    before, record = trained(model), Record()
    with pytest.raises(ValueError, match=r"`num_epochs` is 5 .* the run is 3"):
        trainer(model, tmp_path, [GradDropCallback(), record]).train()
    assert not record.epochs
    assert equal(before, trained(model))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(rows(28))


@pytest.mark.parametrize("variant", ["GradDrop", "Layer-GradDrop"])
def test_steps_are_announced_on_a_stream_too(tmp_path, variant):
    model, record = graddrop(variant, frozen="hold"), Record()
    settings = {"dataset": Stream(), "max_steps": 10, "gradient_accumulation_steps": 1}
    trainer(model, tmp_path, [record, GradDropCallback()], **settings).train()
    assert_moves_what_it_keeps(model, model.peft_config["default"], record, num_epochs=1)


@pytest.mark.parametrize("variant", ["GradDrop-Epoch", "GradFreeze-TopDown", "Anneal-GradDrop"])
def test_epochs_of_a_stream_are_refused_for_their_number_is_unknown(tmp_path, variant):
    """The Trainer counts a stream's epochs up to sys.maxsize: a share of 1/sys.maxsize would train."""
    with pytest.raises(ValueError, match="num_epochs"):
        trainer(graddrop(variant), tmp_path, [GradDropCallback()], dataset=Stream(), max_steps=6).train()


@pytest.mark.parametrize("variant", ["GradDrop-Epoch", "GradFreeze-TopDown", "Anneal-GradDrop"])
def test_epochs_of_the_configuration_divide_the_steps_of_a_stream(tmp_path, variant):
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            layer = next(m for m in kwargs["model"].modules() if isinstance(m, GradDropLayer))
            seen.append(layer.graddrop_sampler["default"].epoch)

    model = graddrop(variant, num_epochs=3)
    settings = {"dataset": Stream(), "max_steps": 9, "gradient_accumulation_steps": 1}
    trainer(model, tmp_path, [GradDropCallback(), Look()], **settings).train()
    assert seen == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("variant", ["Anneal-GradDrop", "GradDrop-Epoch", "GradFreeze-TopDown"])
def test_variant_of_epochs_asks_for_the_callback_at_the_first_backward_pass(tmp_path, variant):
    record = Record()
    with pytest.raises(RuntimeError, match="GradDropCallback"):
        trainer(graddrop(variant, num_epochs=3), tmp_path, [record]).train()
    assert len(record.epochs) == 1
    assert not record.moved
