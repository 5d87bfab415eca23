"""Epochs that were not announced or do not fit the settings are refused."""

import pytest
from graddrop_tools import dropped, graddrop_layers, loss_of, sgd, step, tower

from peft_sparsegrad import GradDrop, GradDropConfig

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
