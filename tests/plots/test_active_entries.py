"""GradDrop's active entries, worked out from the settings, held against the masks of a real training run."""

import numpy as np
import pytest
import torch
from peft import get_peft_model
from tiny import batch, llama

from peft_sparsegrad import GradDrop, GradDropConfig
from peft_sparsegrad.graddrop import VARIANTS, GradDropLayer
from peft_sparsegrad.plots import active_entries, active_shares

LAYERS = [f"model.layers.{number}" for number in range(3)]
EPOCHS = 3


def moved_shares(config: GradDropConfig, steps: int) -> np.ndarray:
    """The share of entries with a gradient in each layer and epoch of a run, in the mean over steps."""
    model = get_peft_model(llama(), config)
    graddrop = GradDrop(model, num_epochs=EPOCHS)
    found = np.zeros((len(LAYERS), EPOCHS))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for epoch in range(EPOCHS):
        graddrop.set_epoch(epoch)
        for step in range(steps):
            model(**batch(step)).loss.backward()
            for row, layer in enumerate(LAYERS):
                found[row, epoch] += _share_with_gradient(model, layer) / steps
            optimizer.step()
            optimizer.zero_grad()
    return found


def _share_with_gradient(model, layer: str) -> float:
    modules = [m for m in model.modules() if isinstance(m, GradDropLayer) and m.graddrop_block == layer]
    weights = [module.deltas("default").weight_delta for module in modules]
    moved = sum(0 if w.grad is None else int(torch.count_nonzero(w.grad)) for w in weights)
    return moved / sum(weight.numel() for weight in weights)


@pytest.mark.parametrize("variant", VARIANTS)
def test_shares_are_those_of_a_training_run(variant):
    config = GradDropConfig.from_variant(variant, task_type="CAUSAL_LM", target_modules=["up_proj", "down_proj"])
    per_step = config.interval == "step"
    random = per_step and config.granularity == "layer"
    found = moved_shares(config, steps=40 if random else 1)
    expected = active_shares(config, LAYERS, EPOCHS)
    assert expected.shape == found.shape
    tolerance = 0.25 if random else 0.0 if config.granularity == "layer" else 0.02
    assert np.abs(found - expected).max() <= tolerance


def test_map_shows_the_shares_with_names_and_numbers():
    config = GradDropConfig.from_variant("GradFreeze-TopDown", num_epochs=3)
    figure = active_entries(config, LAYERS)
    axis, bar = figure.axes
    assert (axis.images[0].get_array() == np.array([[0, 0, 100], [0, 100, 100], [100, 100, 100]])).all()
    assert [label.get_text() for label in axis.get_yticklabels()] == LAYERS
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "2", "3"]
    assert [text.get_text() for text in axis.texts] == ["0", "0", "100", "0", *["100"] * 5]
    assert bar.get_ylabel() == "entries that train, %"


def test_annealing_and_noise():
    anneal = GradDropConfig.from_variant("Anneal-GradDrop", num_epochs=4)
    assert active_shares(anneal, LAYERS)[0] == pytest.approx([0.1, 0.4, 0.7, 1.0])
    noise = GradDropConfig(noise="gaussian")
    assert active_shares(noise, LAYERS, 2).tolist() == [[1.0, 1.0]] * 3


def test_unknown_or_too_few_epochs_are_refused():
    with pytest.raises(ValueError, match="number of epochs is not known"):
        active_shares(GradDropConfig(), LAYERS)
    with pytest.raises(ValueError, match="needs at least 2"):
        active_shares(GradDropConfig.from_variant("GradDrop-Epoch"), LAYERS, 1)
    with pytest.raises(ValueError, match="`num_epochs` is 5 in the GradDrop configuration"):
        active_shares(GradDropConfig(num_epochs=5), LAYERS, 3)
