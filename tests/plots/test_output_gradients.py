"""The share of ∂L/∂Y that is not zero: counted by hand, on a real model, and as it is drawn."""

import numpy as np
import pytest
import torch
from peft import get_peft_model
from tiny import LENGTH, batch, bert

from peft_sparsegrad import SparseGradConfig
from peft_sparsegrad.plots import (
    NonzeroShares,
    nonzero_over_training,
    nonzero_shares,
    output_gradient_rows,
    recorded_nonzero_shares,
)


def strided(tokens=10, out=8):
    """∂L/∂Y (tokens, out) whose even rows are 0, of rank 1, and its right singular vectors."""
    torch.manual_seed(0)
    direction = torch.randn(out)
    dy = torch.randn(tokens, 1) * direction
    dy[::2] = 0
    return dy, torch.linalg.qr(torch.cat([direction[:, None], torch.randn(out, out - 1)], 1)).Q


def test_counts_by_hand():
    dy = torch.tensor([[10.0, 0.0, 1.0, 0.1], [0.0, 0.0, 0.0, 0.0]])
    assert nonzero_shares(dy) == NonzeroShares(rows=0.5, entries=3 / 8, needed=1 / 8, needed_changed=None)
    assert nonzero_shares(torch.tensor([[1.0, 1.0, 0.0, 0.0]])).needed == 0.5
    assert nonzero_shares(torch.zeros(2, 3)) == NonzeroShares(0, 0, 0, None)
    with pytest.raises(ValueError, match="NaN or infinite"):
        nonzero_shares(torch.tensor([[1.0, float("inf")]]))


def test_basis_gathers_a_row_in_one_entry_and_leaves_rows_of_zeros():
    dy, V = strided()
    shares = nonzero_shares(dy, V)
    assert (shares.rows, shares.entries) == (0.5, 0.5)
    assert shares.needed_changed <= 5 / dy.numel() < shares.needed


def test_rows_that_are_not_zero_are_the_tokens_that_matter():
    """In an encoder's last block the token that is classified, below it every token that is not padding."""
    model = get_peft_model(bert(), SparseGradConfig(density=0.05, warmup_steps=0, rank="full"))
    data = batch()
    data["labels"] = torch.arange(len(data["labels"])) % 2
    with recorded_nonzero_shares(model.eval()) as shares:
        for _ in range(3):
            model(**data).loss.backward()
    model(**data).loss.backward()
    assert {len(passes) for passes in shares.values()} == {3}
    for name, passes in shares.items():
        wanted = 1 / LENGTH if ".layer.1." in name else data["attention_mask"].float().mean().item()
        assert passes[0].rows == pytest.approx(wanted)
        assert 0 < passes[0].needed <= passes[0].entries <= passes[0].rows
        assert passes[0].needed_changed is not None


def test_rows_of_zeros_are_left_white():
    dy, V = strided()
    figure = output_gradient_rows(dy, V, "layer")
    own, changed = (axis.images[0] for axis in figure.axes[:2])
    assert own.norm is changed.norm
    assert (np.ma.getmaskarray(own.get_array()) == (dy == 0).numpy()).all()
    assert np.ma.getmaskarray(changed.get_array())[::2].all()
    assert own.cmap.get_bad().tolist() == [1, 1, 1, 1]
    assert figure.get_suptitle() == "layer\n50.0% of the rows and 50.0% of the entries are not zero"
    needed = nonzero_shares(dy, V).needed_changed
    assert figure.axes[1].get_title() == f"change of basis: ∂L/∂Y V, 99% of ‖·‖² in {needed:.1%}"
    assert len([axis for axis in output_gradient_rows(dy, None).axes if axis.images]) == 1


def test_histogram_and_course_hold_every_layer_and_pass():
    shares = {
        "a": [NonzeroShares(0.5, 0.4, 0.1, 0.02), NonzeroShares(0.7, 0.4, 0.3, 0.04)],
        "b": [NonzeroShares(0.1, 0.1, 0.1, 0.04), NonzeroShares(0.1, 0.1, 0.1, 0.06)],
    }
    figure = nonzero_over_training(shares, "run")
    histogram, course = figure.axes[:2]
    assert [np.asarray(line.get_ydata()).tolist() for line in course.lines] == [
        pytest.approx(values) for values in ([30, 40], [25, 25], [10, 20], [3, 5])
    ]
    assert len(histogram.patches) == 4
    assert histogram.get_ylim()[1] > 2
    assert "rows that are not 0" in [text.get_text() for text in figure.legends[0].get_texts()]
    without = {"a": [NonzeroShares(0.5, 0.4, 0.1, None)]}
    assert len(nonzero_over_training(without).axes[1].lines) == 3


def test_what_cannot_be_drawn_is_refused():
    dy, V = strided()
    with pytest.raises(ValueError, match=r"are needed, not \[\(10, 8\), \(10, 8\)\]"):
        output_gradient_rows(dy, dy)
    with pytest.raises(ValueError, match="the gradient is zero"):
        output_gradient_rows(torch.zeros_like(dy), V)
    for wrong in ({}, {"a": []}, {"a": [NonzeroShares(1, 1, 1, 1)], "b": []}):
        with pytest.raises(ValueError, match="same number of backward passes"):
            nonzero_over_training(wrong)
