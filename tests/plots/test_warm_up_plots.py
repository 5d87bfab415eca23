"""Spectra, supports and energies: what is drawn is what the warm-up, the adapter and the log say."""

import dataclasses

import matplotlib
import numpy as np
import pytest
import torch
from tiny import adapted, batch

from peft_sparsegrad import warmup
from peft_sparsegrad.plots import energy_over_training, spectra, support_maps
from peft_sparsegrad.plots.supports import LayerSupport
from peft_sparsegrad.sparsegrad.layer import layer_adapters


@pytest.fixture(scope="module")
def warmed():
    model = adapted(warmup_steps=4, slack=6)
    return model, warmup(model, [batch(seed) for seed in range(4)], progress=False)


def test_spectra_are_the_reports(warmed):
    _, report = warmed
    figure = spectra(report)
    along, running, captured = figure.axes
    group = report.groups[0]
    spectrum = np.array(group.spectrum_in)
    curve, circle = along.lines[:2]
    assert np.allclose(curve.get_ydata(), 100 * spectrum / group.energy)
    assert circle.get_xdata()[0] == group.core_shape[1] == 10
    assert running.lines[0].get_ydata()[-1] == pytest.approx(100)
    assert running.lines[1].get_ydata()[0] == pytest.approx(100 * spectrum[:10].sum() / spectrum.sum())
    widths = [bar.get_width() for container in captured.containers for bar in container]
    shares = [100 * getattr(g, f"energy_in_{part}") for part in ("core", "support") for g in report.groups]
    assert widths == pytest.approx(shares)
    marks = [list(line.get_xdata()) for line in captured.lines if line.get_marker() == "|"]
    assert marks == [[100 * getattr(g, f"chance_in_{p}") for g in report.groups] for p in ("core", "support")]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "model.layers.*.mlp.up_proj (U)",
        "model.layers.*.mlp.down_proj (U)",
    ]


def test_spectra_without_a_part_draw_the_rest(warmed):
    _, report = warmed
    bare = [dataclasses.replace(group, spectrum_in=[], spectrum_out=[]) for group in report.groups]
    assert len(spectra(dataclasses.replace(report, groups=bare)).axes) == 1
    unmeasured = [dataclasses.replace(g, energy_in_core=None, energy_in_support=None) for g in report.groups]
    assert len(spectra(dataclasses.replace(report, groups=unmeasured)).axes) == 2
    empty = [dataclasses.replace(group, energy_in_core=None) for group in bare]
    with pytest.raises(ValueError, match="no spectrum and no captured energy"):
        spectra(dataclasses.replace(report, groups=empty))


def test_support_maps_show_where_the_entries_are(warmed):
    model, _ = warmed
    layers = []
    for adapter in layer_adapters(model, "default"):
        plan = adapter.plan
        layers.append(LayerSupport(plan.name, plan.role, adapter.indices, plan.core_shape))
    figure = support_maps(layers)
    maps = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in maps] == ["layer 0", "layer 1", "layer 2"] * 2
    for axis, layer in zip(maps[:3], layers[::2], strict=True):  # up_proj, whose core is 64 x 10
        cells = axis.images[0].get_array()
        mask = torch.zeros(640)
        mask[layer.indices] = 100
        assert cells.shape == (60, 10)
        column_shares = mask.view(64, 10).mean(0)
        assert np.corrcoef(cells.mean(0), column_shares)[0, 1] > 0.98
        assert axis.images[0].get_extent() == [0, 10, 64, 0]


def test_of_many_layers_some_are_drawn_and_the_title_says_so():
    layers = [LayerSupport(f"h.{i}.fc", "h.*.fc", torch.tensor([i]), (5, 5)) for i in range(24)]
    figure = support_maps(layers)
    maps = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in maps] == [f"layer {i}" for i in (0, 5, 9, 14, 18, 23)]
    assert figure.subfigs[0].get_suptitle() == "h.*.fc, 6 of 24 layers"
    assert maps[1].images[0].get_array()[1, 0] == 100
    with pytest.raises(ValueError, match="no static support"):
        support_maps([])


def test_energy_over_training_is_the_logs():
    log = [
        {"step": 5, "loss": 2.0, "sparsegrad_energy_in_core": 0.8, "sparsegrad_energy_in_support": 0.5},
        {"step": 10, "loss": 1.5},
        {"step": 15, "loss": 1.0, "sparsegrad_energy_in_core": 0.7, "sparsegrad_energy_in_support": 0.4},
        {"step": 15, "train_runtime": 3.0},
    ]
    energies, losses = energy_over_training(log).axes
    core, support = energies.lines
    assert (core.get_xdata().tolist(), core.get_ydata().tolist()) == ([5, 15], [80, 70])
    assert support.get_ydata().tolist() == [50, 40]
    assert losses.lines[0].get_ydata().tolist() == [2.0, 1.5, 1.0]
    with pytest.raises(ValueError, match="no energy captured"):
        energy_over_training(log[1:2])


def test_callers_matplotlib_settings_neither_matter_nor_change(warmed):
    _, report = warmed
    with matplotlib.rc_context({"font.size": 30}):
        label = spectra(report).axes[0].xaxis.label
        assert matplotlib.rcParams["font.size"] == 30
    assert label.get_size() == 9
