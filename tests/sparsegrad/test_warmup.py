"""The three ways of running the warm-up."""

import dataclasses
import json
import re
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import adapted, batch, llama, logits, train
from torch import nn

from peft_sparsegrad import (
    SparseGradConfig,
    SparseGradLinear,
    WarmUpReport,
    save_transition_matrices,
    warmup,
    warmup_report,
)
from peft_sparsegrad.sparsegrad.layer import layer_adapters

BATCHES = [batch(seed) for seed in range(4)]
FOR_BASES, FOR_SUPPORTS = slice(0, 2), slice(2, 4)


def layers(model):
    return [module for module in model.modules() if isinstance(module, SparseGradLinear)]


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items() if "sparsegrad_" in key}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def gradients_of_the_weights(batches):
    """Literal ∂L/∂W of every adapted layer and batch, from a model whose weights are unfrozen."""
    model, found = llama(), {}
    for data in batches:
        model.zero_grad()
        model(**data).loss.backward()
        for name, parameter in model.named_parameters():
            if name.endswith(("up_proj.weight", "down_proj.weight")):
                found.setdefault(name.removesuffix(".weight"), []).append(parameter.grad.clone())
    return found


@pytest.mark.parametrize("role", ["up_proj", "down_proj"])
def test_basis_and_support_are_those_of_the_stacked_gradients(role):
    model = adapted(warmup_steps=4, rank=16)
    warmup(model, BATCHES, progress=False)
    gradients = {name: g for name, g in gradients_of_the_weights(BATCHES).items() if name.endswith(role)}
    stack = torch.stack(
        [g for per_layer in gradients.values() for g in per_layer[FOR_BASES]]
    ).double()  # (steps * blocks, out, in)
    left = torch.linalg.svd(stack.transpose(0, 1).flatten(1)).U[:, :16]
    right = torch.linalg.svd(stack.transpose(0, 2).flatten(1)).U[:, :16]
    for layer in (layer for layer in layers(model) if layer.adapter("default").plan.name.endswith(role)):
        adapter = layer.adapter("default")
        plan, group = adapter.plan, adapter.basis
        assert torch.allclose((group.V.double().T @ left).abs(), torch.eye(16, dtype=torch.float64), atol=1e-3)
        assert torch.allclose((group.U.double().T @ right).abs(), torch.eye(16, dtype=torch.float64), atol=1e-3)
        score = (group.V.T @ sum(gradients[plan.name][FOR_SUPPORTS]) @ group.U).abs().flatten()
        assert set(adapter.indices.tolist()) == set(score.topk(plan.k).indices.tolist())


def test_energy_sgradient_sums_squares():
    model = adapted(warmup_steps=4, rank=16, support_score="energy")
    warmup(model, BATCHES, progress=False)
    gradients = gradients_of_the_weights(BATCHES)
    for layer in layers(model):
        adapter = layer.adapter("default")
        plan, group = adapter.plan, adapter.basis
        score = sum((group.V.T @ g @ group.U).square() for g in gradients[plan.name][FOR_SUPPORTS]).flatten()
        assert set(adapter.indices.tolist()) == set(score.topk(plan.k).indices.tolist())


def test_report_tells_the_energy_captured_and_survives_json(tmp_path):
    model = adapted(warmup_steps=4, rank=16)
    report = warmup(model, BATCHES, progress=False)
    gradients, in_core, in_support = gradients_of_the_weights(BATCHES), {}, {}
    for adapter in (layer.adapter("default") for layer in layers(model)):
        name, group = adapter.plan.name, adapter.basis
        if name.endswith("up_proj"):
            cores = torch.stack([group.V.T @ g @ group.U for g in gradients[name][FOR_SUPPORTS]])
            total = sum(g.square().sum() for g in gradients[name][FOR_SUPPORTS]).item()
            in_core[name] = cores.square().sum().item() / total
            in_support[name] = cores.flatten(1)[:, adapter.indices].square().sum().item() / total
    found = next(group for group in report.groups if group.name == "model.layers.*.mlp.up_proj")
    assert found.core_of_layers == pytest.approx(in_core, rel=1e-4)
    assert found.support_of_layers == pytest.approx(in_support, rel=1e-4)
    assert len(in_core) == 3
    assert found.energy_in_core == sorted(found.core_of_layers.values())[1]
    assert found.energy_in_support == sorted(found.support_of_layers.values())[1]
    assert (found.chance_in_core, found.chance_in_support) == (16 * 16 / (64 * 32), found.num_values / (64 * 32))
    assert 0 < found.energy_in_support < found.energy_in_core < 1
    assert found.spectrum_in == sorted(found.spectrum_in, reverse=True)
    assert "model.layers.*.mlp.up_proj" in str(report)
    report.to_json(tmp_path / "report.json")
    assert WarmUpReport.from_json(tmp_path / "report.json") == report


def test_report_tells_what_the_warm_up_has_cost():
    model = adapted(warmup_steps=4)
    assert warmup_report(model) is None
    began = time.perf_counter()
    report = warmup(model, BATCHES, progress=False)
    assert warmup_report(model) is report
    assert report.passes == 4
    assert 0 < report.seconds < time.perf_counter() - began
    assert report.steps_worth > 4, "the observing comes on top"
    assert f"4 backward passes in {report.seconds:.1f} s, worth about {report.steps_worth:.0f} training" in str(report)
    assert str(dataclasses.replace(report, steps_worth=None)).startswith(
        f"4 backward passes in {report.seconds:.1f} s."
    )


@pytest.mark.parametrize("settings", [{}, {"rank": 16}, {"basis": "svd"}, {"support": "dynamic"}], ids=str)
@pytest.mark.parametrize("passes", [2, 3, 4])
def test_every_way_of_warming_up_gives_the_same(settings, passes):
    """Batches, a callable, and the first passes of a training whose rate is 0."""
    first, second, third = (adapted(warmup_steps=passes, **settings) for _ in range(3))
    report = warmup(first, BATCHES, progress=False)
    assert report.passes == passes
    position = iter(BATCHES[:passes])
    warmup(second, lambda: second(**next(position)).loss.backward(), progress=False)
    for data in BATCHES[:passes]:
        third(**data).loss.backward()
        third.zero_grad()
    third.eval()(**BATCHES[0])  # the next forward pass ends the last pass
    assert same(state(first), state(second))
    assert same(state(first), state(third))
    assert all(layer.adapter("default").is_settled for layer in layers(third))


def test_a_pass_without_a_gradient_is_run_again():
    """Two batches of zero gradients among four: the other two are used for bases and supports."""
    model, expected, silent = adapted(warmup_steps=4), adapted(warmup_steps=4), iter([True, False, True, False] * 2)
    position = iter([None, BATCHES[0], None, BATCHES[1]] * 2)

    def run_pass():
        data = next(position)
        (model(**(data or BATCHES[0])).loss * (0.0 if next(silent) else 1.0)).backward()

    report = warmup(model, run_pass, steps=4, progress=False)
    assert (report.passes, report.passed_over) == (4, 4)
    warmup(expected, BATCHES[:2] * 2, progress=False)
    assert same(state(model), state(expected))


def test_warm_up_leaves_model_and_gradients_alone():
    model = adapted(warmup_steps=4, modules_to_save=["lm_head"]).eval()
    before = {key: value.clone() for key, value in model.state_dict().items() if "sparsegrad_" not in key}
    expected = logits(model)
    model(**batch()).loss.backward()
    head = next(p for n, p in model.named_parameters() if "lm_head.modules_to_save" in n)
    kept = head.grad.clone()
    warmup(model, BATCHES, progress=False)
    assert torch.equal(head.grad, kept)
    assert not model.training
    assert torch.equal(logits(model), expected)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_nothing_called_watches_then_trains(caplog):
    model = adapted(warmup_steps=4)
    losses = train(model, steps=4)
    assert all(layer.adapter("default").is_settled for layer in layers(model))
    assert not any(layer.adapter("default").values.any() for layer in layers(model))
    done = [record.getMessage() for record in caplog.records if "warm-up is done" in record.getMessage()]
    assert len(done) == 1
    assert re.search(r"4 backward passes in \d.* s, worth about \d+ training steps of one pass, 6 layers", done[0])
    assert "\n" not in done[0]
    assert warmup_report(model).passes == 4
    assert train(model, steps=9)[-1] < losses[0]


@pytest.mark.parametrize("steps", [2, 3, 7])
def test_nothing_called_takes_exactly_the_steps_asked_for(steps):
    model = adapted(warmup_steps=steps)
    train(model, steps=steps - 1)
    assert not layers(model)[0].adapter("default").is_settled
    train(model, steps=1)
    assert all(layer.adapter("default").is_settled for layer in layers(model))


def test_evaluation_during_the_warm_up_is_not_watched():
    model = adapted(warmup_steps=3)
    train(model, steps=1)
    logits(model)
    with torch.no_grad():
        model(**batch())
    assert layers(model)[0].adapter("default").warmup.passes_watched == 1


def test_a_layer_that_is_not_used_in_every_pass_does_not_hold_up_the_others():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.always, self.sometimes = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x, both):
            return self.sometimes(self.always(x)) if both else self.always(x)

    config = SparseGradConfig(target_modules=["always", "sometimes"], density=0.2, warmup_steps=4)
    model = get_peft_model(Branches(), config)
    for step in range(8):
        model(torch.randn(4, 16), both=step % 2 == 0).square().sum().backward()
    assert all(layer.adapter("default").is_settled for layer in layers(model))


def test_dynamic_support_needs_only_the_basis():
    model = adapted(warmup_steps=4, support="dynamic")
    report = warmup(model, BATCHES, progress=False)
    assert report.passes == 4
    assert layers(model)[0].adapter("default").indices is None
    train(model, steps=1)
    for layer in layers(model):
        adapter = layer.adapter("default")
        plan, values = adapter.plan, adapter.values
        assert values.numel() == plan.num_entries
        assert int((values != 0).sum()) == plan.k


# Reuse from a file ---------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    model = adapted(warmup_steps=4, rank=24)
    warmup(model, BATCHES, progress=False)
    path = tmp_path / "matrices.safetensors"
    save_transition_matrices(model, path)
    return model, str(path)


def test_file_gives_the_same_adapter_without_data(saved):
    model, path = saved
    assert same(state(adapted(warmup_steps=4, rank=24, transition_matrices=path)), state(model))


def test_file_with_another_density_gives_the_basis_and_watches_for_the_support(saved):
    model, path = saved
    other = adapted(warmup_steps=2, rank=20, density=0.1, transition_matrices=path)
    group, own = layers(model)[0].adapter("default").basis, layers(other)[0].adapter("default").basis
    assert torch.equal(own.U, group.U[:, :20])
    train(other, steps=2)
    assert torch.equal(own.U, group.U[:, :20])
    assert layers(other)[0].adapter("default").is_settled


def test_file_of_one_sided_bases(tmp_path):
    """`up_proj` has a U and `down_proj` a V; a narrower adapter takes the leading columns."""
    model = adapted(warmup_steps=4, slack=6)
    warmup(model, BATCHES, progress=False)
    path = str(tmp_path / "matrices.safetensors")
    save_transition_matrices(model, path)
    assert sorted(key for key in load_file(path) if key.startswith("group.")) == ["group.0.U", "group.1.V"]
    assert same(state(adapted(warmup_steps=4, slack=6, transition_matrices=path)), state(model))
    narrow = adapted(warmup_steps=4, slack=3, transition_matrices=path)
    for layer, wide in zip(layers(narrow), layers(model), strict=True):
        own, group = layer.adapter("default").basis, wide.adapter("default").basis
        for name in ("U", "V"):
            ours, theirs = getattr(own, name), getattr(group, name)
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours, theirs[:, : ours.shape[1]])
        assert not layer.adapter("default").is_settled
    base = llama()
    for change in ({"slack": 12}, {"rank": 12}, {"rank": (8, None)}, {"rank": (None, 8)}):
        with pytest.raises(ValueError, match=r"\(\[64, 32\], \[None, 10\]\)|\(\[32, 64\], \[10, None\]\)") as error:
            adapted(base, **{"warmup_steps": 4, "slack": 6, "transition_matrices": path, **change})
        assert "None: that side keeps the weight's own basis" in str(error.value)
        assert not layers(base)


@pytest.mark.parametrize("role", ["up_proj", "down_proj"])
def test_default_basis_and_support_are_those_of_the_narrow_side(role):
    model = adapted(warmup_steps=4)
    warmup(model, BATCHES, progress=False)
    gradients = {name: g for name, g in gradients_of_the_weights(BATCHES).items() if name.endswith(role)}
    stack = torch.stack([g for per_layer in gradients.values() for g in per_layer[FOR_BASES]]).double()
    unfolding = stack.transpose(0, 2).flatten(1) if role == "up_proj" else stack.transpose(0, 1).flatten(1)
    for layer in (layer for layer in layers(model) if layer.adapter("default").plan.name.endswith(role)):
        adapter = layer.adapter("default")
        plan, group = adapter.plan, adapter.basis
        basis, other = (group.U, group.V) if role == "up_proj" else (group.V, group.U)
        assert other is None
        rank = basis.shape[1]
        best = torch.linalg.svd(unfolding).U[:, :rank]
        assert torch.allclose((basis.double().T @ best).abs(), torch.eye(rank, dtype=torch.float64), atol=1e-3)
        summed = sum(gradients[plan.name][FOR_SUPPORTS])
        score = (summed @ basis if role == "up_proj" else basis.T @ summed).abs().flatten()
        assert set(adapter.indices.tolist()) == set(score.topk(plan.k).indices.tolist())


def test_file_is_not_needed_to_load_the_adapter(saved, tmp_path):
    from peft import PeftModel

    _, path = saved
    model = adapted(warmup_steps=4, rank=24, transition_matrices=path)
    train(model, steps=2)
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["transition_matrices"] is None
    (tmp_path / "matrices.safetensors").unlink()
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "adapter")), logits(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 40}, r"needs weight shape \(64, 32\) and at least the ranks \[40, 32\]"),
        ({"rank": "auto", "slack": 6}, r"needs weight shape \(64, 32\) and at least the ranks \[None, 10\]"),
        ({"rank": (None, 24)}, "at least the ranks"),
        ({"target_modules": ["gate_proj"]}, "has no basis for module 'model.layers.0.mlp.gate_proj'"),
        ({"transition_matrices": "nowhere.safetensors"}, "there is no file 'nowhere.safetensors'"),
    ],
)
def test_file_that_does_not_fit_is_refused_before_anything_changes(saved, change, message):
    _, path = saved
    model = llama()
    with pytest.raises(ValueError, match=message):
        adapted(model, **{"warmup_steps": 4, "rank": 24, "transition_matrices": path, **change})
    assert not layers(model)


def test_file_of_another_model_is_refused(saved):
    _, path = saved
    with pytest.raises(ValueError, match="needs weight"):
        adapted(llama(hidden_size=48), warmup_steps=4, rank=24, transition_matrices=path)


def test_damaged_or_foreign_file_is_refused(saved, tmp_path):
    _, path = saved
    content = Path(path).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    save_file(load_file(path), tmp_path / "foreign.safetensors")
    for name, message in (("cut", "damaged"), ("foreign", "not written by")):
        with pytest.raises(ValueError, match=message):
            adapted(warmup_steps=4, rank=24, transition_matrices=str(tmp_path / f"{name}.safetensors"))


# Bad input -----------------------------------------------------------------------------------------------------------


def refuses(model, batches, message, **settings):
    before = state(model)
    with pytest.raises(ValueError, match=message):
        warmup(model, batches, progress=False, **settings)
    assert same(state(model), before)
    return model


def test_batches_without_a_loss():
    unlabelled = [{key: value for key, value in data.items() if key != "labels"} for data in BATCHES]
    refuses(adapted(warmup_steps=4), unlabelled, "batch 0 gave no loss: put `labels` into the batch")


def test_batches_that_run_dry():
    refuses(adapted(warmup_steps=4), iter(BATCHES), "ran dry after 4 of 5", steps=5)
    refuses(adapted(warmup_steps=4), [], "ran dry after 0 of 4")
    refuses(adapted(warmup_steps=4), BATCHES[:1], "ran dry after 1 of 4.*of which the warm-up needs 2")
    refuses(adapted(warmup_steps=4), BATCHES, "`steps` must be at least 2 .*, not 1", steps=1)


def test_fewer_batches_than_the_configuration_asks_for_are_used_once_each():
    model, expected = adapted(warmup_steps=8), adapted(warmup_steps=3)
    assert warmup(model, iter(BATCHES[:3]), progress=False).passes == 3
    warmup(expected, BATCHES, progress=False)
    assert same(state(model), state(expected))


def test_callable_that_runs_dry():
    model, position = adapted(warmup_steps=4), iter(BATCHES)
    refuses(model, lambda: model(**next(position)).loss.backward(), "ran dry", steps=5)


def test_callable_without_a_backward_pass():
    model = adapted(warmup_steps=4)
    refuses(model, lambda: model(**BATCHES[0]), "saw no gradient", steps=2)


def test_loss_that_is_not_finite():
    model = adapted(warmup_steps=4)
    with torch.no_grad():
        model.get_base_model().lm_head.weight[3, 0] = float("inf")
    refuses(model, BATCHES, "batch 0 gave a loss of")


def test_gradient_that_is_not_finite_names_the_module():
    model = adapted(warmup_steps=4)

    def backward():
        loss = model(**BATCHES[0]).loss
        (loss * float("inf")).backward()

    refuses(model, backward, "NaN or Inf in the gradient of module 'model.layers.2.mlp.down_proj'", steps=2)


def test_after_a_failure_the_warm_up_can_be_run_again():
    model = refuses(adapted(warmup_steps=4), iter(BATCHES), "ran dry", steps=5)
    expected = adapted(warmup_steps=4)
    warmup(expected, BATCHES, progress=False)
    warmup(model, BATCHES, progress=False)
    assert same(state(model), state(expected))


def test_trained_adapter_is_not_warmed_up_again():
    model = adapted()
    train(model, steps=1)
    refuses(model, BATCHES, "has been trained: another basis or support")


def test_nothing_to_warm_up():
    with pytest.raises(ValueError, match="no SparseGrad adapter"):
        warmup(llama(), BATCHES)
    with pytest.raises(ValueError, match="needs no data"):
        warmup(adapted(basis="svd", support="dynamic"), BATCHES)
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        warmup(model, BATCHES)


def test_modules_outside_the_loss_are_named(caplog):
    class Deaf(nn.Module):
        def __init__(self):
            super().__init__()
            self.heard, self.unheard = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return {"loss": self.heard(x).square().sum()}

    model = get_peft_model(Deaf(), SparseGradConfig(target_modules=["heard", "unheard"], density=0.2))
    warmup(model, [{"x": torch.randn(4, 16)}] * 2, progress=False)
    assert "saw no gradient of ['unheard'] in its passes for the bases" in caplog.text
    assert "saw no gradient of ['unheard'], so their supports are data-free" in caplog.text
    heard, unheard = layer_adapters(model, "default")
    assert heard.is_settled
    assert unheard.is_settled
    assert unheard.basis.U is None or torch.equal(unheard.basis.U, torch.eye(*unheard.basis.U.shape))


@pytest.mark.parametrize("steps", [0, 3])
def test_saving_before_the_end_of_a_warm_up_says_that_it_begins_again(tmp_path, steps):
    model = adapted(warmup_steps=4)
    train(model, steps=steps)
    with pytest.warns(
        UserWarning, match=f"saved after {steps} of the 4 passes.*begins the warm-up again.*set `warmup_steps=2`, or"
    ):
        model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert train(loaded, steps=6) == train(adapted(warmup_steps=4), steps=6)
