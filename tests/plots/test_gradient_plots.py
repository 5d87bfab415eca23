"""Gradients before and after the change of basis: what is drawn is what was given."""

import numpy as np
import pytest
import torch

from peft_sparsegrad.plots import gradient_heat_map, gradient_magnitudes
from peft_sparsegrad.plots.style import MOST_CELLS, pooled


def low_rank(out=40, in_=30):
    """A gradient that is nearly of rank 2, and its singular vectors."""
    torch.manual_seed(1)
    G = torch.randn(out, 2) @ torch.randn(2, in_) + 0.01 * torch.randn(out, in_)
    V, _, Uh = torch.linalg.svd(G, full_matrices=False)
    return G, Uh.T, V


def images(figure):
    return [axis.images[0] for axis in figure.axes if axis.images]


def test_heat_maps_show_the_magnitudes_on_one_scale():
    G, U, V = low_rank()
    figure = gradient_heat_map(G, U[:, :10], V, title="layer")
    before, after = images(figure)
    assert before.norm is after.norm
    floor = before.norm.vmin
    assert floor < before.norm.vmax / 100
    assert np.allclose(before.get_array(), G.abs().clamp(min=floor))
    assert np.allclose(after.get_array(), (V.T @ G @ U[:, :10]).abs().clamp(min=floor), atol=1e-5)
    assert after.get_array().max() == pytest.approx(before.norm.vmax)
    assert figure.get_suptitle() == "layer"
    assert [axis.get_title() for axis in figure.axes[:2]] == [
        "own basis: G = ∂L/∂W",
        "change of basis: Vᵀ G U, 100% of ‖G‖²",
    ]
    assert "loss per unit of weight" in figure.axes[2].get_ylabel()


def test_side_in_its_own_basis_is_labelled_so():
    G, U, _ = low_rank()
    axis = gradient_heat_map(G, U[:, :1], None).axes[1]
    share = (G @ U[:, :1]).square().sum() / G.square().sum()
    assert axis.get_title() == f"change of basis: G U, {share:.0%} of ‖G‖²"
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("column of U", "output feature")


def test_large_matrix_is_pooled_to_its_largest_entries_and_the_axis_says_so():
    G = torch.zeros(900, 600)
    G[450, 300] = 7.0
    G[0, 0] = 1.0
    cells, how = pooled(G)
    assert cells.shape == (MOST_CELLS, MOST_CELLS)
    assert (cells[150, 150], cells[0, 0], (cells != 0).sum()) == (7.0, 1.0, 2)
    assert how == f"(drawn in {MOST_CELLS} × {MOST_CELLS} cells, each with its largest entry)"
    axis = gradient_heat_map(G, None, None).axes[0]
    assert axis.get_xlabel().endswith(f"\n{how}")
    assert axis.images[0].get_extent() == [0, 600, 900, 0]


def test_magnitudes_are_sorted_and_energies_counted():
    G, U, V = low_rank()
    curves, energies = gradient_magnitudes(G, U, V).axes[:2]
    own, changed = curves.lines[:2]
    assert own.get_ydata()[0] == pytest.approx(G.abs().max().item())
    assert own.get_ydata()[-1] == pytest.approx(G.abs().min().item())
    assert (np.diff(own.get_ydata()) <= 0).all()
    assert own.get_xdata()[-1] == pytest.approx(100)
    largest = G.abs().flatten().sort(descending=True).values
    expected = (100 * largest[:12].square().sum() / largest.square().sum()).item()
    assert np.interp(1.0, energies.lines[0].get_xdata(), energies.lines[0].get_ydata()) == pytest.approx(
        expected, 1e-3
    )
    assert energies.lines[1].get_ydata()[-1] == pytest.approx(100, rel=1e-5)
    shown = [text.get_text() for text in energies.get_legend().get_texts()]
    assert shown[0] == f"own basis: G, {expected:.0f}% in 1%"
    # the change of basis gathers nearly everything in two entries
    assert changed.get_ydata()[0] > 3 * own.get_ydata()[0]


def test_core_of_fewer_columns_counts_shares_of_the_weight():
    G, U, _ = low_rank()
    energies = gradient_magnitudes(G, U[:, :3], None).axes[1]
    assert energies.lines[1].get_xdata()[-1] == pytest.approx(10)
    assert energies.lines[1].get_ydata()[-1] == pytest.approx(
        100 * ((G @ U[:, :3]).square().sum() / G.square().sum()).item(), rel=1e-5
    )


@pytest.mark.parametrize("draw", [gradient_heat_map, gradient_magnitudes])
def test_what_cannot_be_drawn_is_refused(draw):
    G, U, V = low_rank()
    with pytest.raises(ValueError, match=r"are needed, not \[\(40, 30\), \(40, 30\), None\]"):
        draw(G, V, None)
    for bad in (torch.zeros(3, 3), torch.full((3, 3), float("nan"))):
        with pytest.raises(ValueError, match="zero, or has NaN"):
            draw(bad, None, None)
    with pytest.raises(ValueError, match="are needed"):
        draw(G.flatten(), U, V)
