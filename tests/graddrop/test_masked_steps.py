"""What optimizers do to masked entries, and GradDrop on models that have no GradDrop adapter."""

import gc
import weakref

import pytest
import torch
from graddrop_tools import adamw, deltas, dropped, graddrop_layers, loss_of, masks_of, sgd, step, tower
from peft import LoraConfig, get_peft_model
from tiny import adapted, batch, bert, llama, train
from torch import nn

from peft_sparsegrad import GradDrop, GradDropConfig, SparseGradAdam
from peft_sparsegrad.common import optimizer_watcher
from peft_sparsegrad.common.optimizer_watcher import observers


class NestedAdam(torch.optim.Adam):
    """Moves its parameters after the step of its base class, which is a step of the same optimizer."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.sub_(0.01)
        return loss


torch.optim.Adam([nn.Parameter(torch.zeros(1))])  # from now on torch hooks the step of the base class too
OPTIMIZERS = {
    "Adam, nested": lambda ps: NestedAdam(ps, lr=0.01),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.1),
    "Adam, not foreach": lambda ps: torch.optim.Adam(ps, lr=0.01, weight_decay=0.1, foreach=False),
    "Adam, fused": lambda ps: torch.optim.Adam(ps, lr=0.01, weight_decay=0.1, fused=True),
    "SGD with momentum": lambda ps: torch.optim.SGD(ps, lr=1e-3, momentum=0.9, weight_decay=0.1),
    "SGD, Nesterov": lambda ps: torch.optim.SGD(ps, lr=1e-3, momentum=0.9, nesterov=True),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.01, weight_decay=0.1),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=0.001, momentum=0.9, weight_decay=0.1),
    "SparseGradAdam": lambda ps: SparseGradAdam(ps, lr=0.01, weight_decay=0.1),
    "SparseGradAdam, dense": lambda ps: SparseGradAdam(ps, lr=0.01, weight_decay=0.1, sparse=False),
}
GRANULARITIES = {
    "element, step": {"p": 0.5, "frozen": "hold"},
    "layer, step": {"p": 0.5, "granularity": "layer"},
    "element, epoch": {"variant": "GradDrop-Epoch-Toggle", "num_epochs": 3},
    "layer, epoch": {"variant": "GradFreeze-Toggle-TopDown", "num_epochs": 3},
    "element, epoch, drawn anew": {"variant": "GradDrop-Epoch-Reset", "p": 0.5},
}


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def kept_now(masks, parameters) -> dict[str, torch.Tensor]:
    """Name to the entries that the masks of this step keep."""
    return {
        name: masks.mask(name, block).keep(parameter.shape, parameter.device)
        for name, (parameter, block) in parameters.items()
    }


def with_blocks(model):
    layers = graddrop_layers(model)
    return {name: (delta, layers[name.rpartition(".")[0]].graddrop_block) for name, delta in deltas(model).items()}


@pytest.mark.parametrize("settings", GRANULARITIES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_masked_entries_of_an_adapter_are_held_and_the_others_move(optimizer, settings):
    model = dropped(tower(), init_weights=False, **GRANULARITIES[settings])
    optimizer, masks, graddrop = OPTIMIZERS[optimizer](trained(model)), masks_of(model), GradDrop(model)
    for number in range(20):
        graddrop.set_epoch(number // 7)
        before = {name: delta.detach().clone() for name, delta in deltas(model).items()}
        loss_of(model, number).backward()
        kept = kept_now(masks, with_blocks(model))
        nn.utils.clip_grad_norm_(trained(model), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for name, delta in deltas(model).items():
            assert torch.equal(delta != before[name], kept[name]), (name, number)


@pytest.mark.parametrize("settings", GRANULARITIES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_masked_entries_of_a_plain_model_are_held_and_the_others_move(optimizer, settings):
    settings = dict(GRANULARITIES[settings])
    variant = settings.pop("variant", None)
    config = GradDropConfig.from_variant(variant, **settings) if variant else GradDropConfig(**settings)
    model = tower()
    optimizer, graddrop = OPTIMIZERS[optimizer](trained(model)), GradDrop(model, config)
    masked = {m.name: (m.parameter, m.block) for m in graddrop.masked_parameters()}
    for number in range(6):
        graddrop.set_epoch(number // 2)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        loss_of(model, number).backward()
        kept = kept_now(graddrop.samplers[0], masked)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for name, parameter in model.named_parameters():
            moved = parameter != before[name]
            assert torch.equal(moved, kept.get(name, torch.ones_like(moved))), (name, number)


@pytest.mark.parametrize("granularity", ["element", "layer"])
def test_entries_are_held_where_no_gradient_is_kept_between_steps(granularity):
    """Weight decay and momentum of an entry whose gradient is zero rather than None."""
    model = dropped(tower(), granularity=granularity, p=0.9, frozen="hold", init_weights=False)
    optimizer = adamw(model, weight_decay=0.5)
    for number in range(10):
        before = {name: delta.detach().clone() for name, delta in deltas(model).items()}
        loss_of(model, number).backward()
        kept = kept_now(masks_of(model), with_blocks(model))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        for name, delta in deltas(model).items():
            assert torch.equal(delta != before[name], kept[name])


def test_step_with_a_closure_holds_masked_entries():
    model = dropped(tower(), p=0.5, frozen="hold", init_weights=False)
    optimizer = adamw(model, weight_decay=0.1)
    kept = {}

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        kept.update(kept_now(masks_of(model), with_blocks(model)))
        return loss

    for number in range(4):
        before = {name: delta.detach().clone() for name, delta in deltas(model).items()}
        optimizer.step(closure)
        for name, delta in deltas(model).items():
            assert torch.equal(delta != before[name], kept[name]), (name, number)


def test_gradient_mode_lets_momentum_move_masked_entries_as_adamws_equation_says():
    model = dropped(tower(), p=0.5, scale=False)
    optimizer = adamw(model, lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    twin = {name: delta.detach().clone() for name, delta in deltas(model).items()}
    m = {name: torch.zeros_like(value) for name, value in twin.items()}
    v = {name: torch.zeros_like(value) for name, value in twin.items()}
    moved_though_masked = 0
    for t in range(1, 6):
        loss_of(model, t).backward()
        kept = kept_now(masks_of(model), with_blocks(model))
        for name, delta in deltas(model).items():
            g = delta.grad.clone()
            assert not g[~kept[name]].any()
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.99 * v[name] + 0.01 * g * g
            update = (m[name] / (1 - 0.9**t)) / ((v[name] / (1 - 0.99**t)).sqrt() + 1e-8)
            twin[name] = twin[name] * (1 - 0.01 * 0.1) - 0.01 * update
        before = {name: delta.detach().clone() for name, delta in deltas(model).items()}
        optimizer.step()
        optimizer.zero_grad()
        for name, delta in deltas(model).items():
            assert torch.allclose(delta, twin[name])
            moved_though_masked += int((delta != before[name])[~kept[name]].sum())
    assert moved_though_masked > 0


def test_gradient_mode_is_the_papers_equation_under_sgd():
    """θ ← θ − α g ⊙ m with m ~ Bernoulli(1 − p) / (1 − p), on a plain model."""
    model, twin = tower(), tower()
    graddrop, optimizer = GradDrop(model, GradDropConfig(p=0.5)), sgd(model, lr=0.01)
    masked = {m.name: (m.parameter, m.block) for m in graddrop.masked_parameters()}
    for number in range(4):
        loss_of(twin, number).backward()
        loss_of(model, number).backward()
        kept = kept_now(graddrop.samplers[0], masked)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                parameter -= 0.01 * parameter.grad * (kept[name] / 0.5 if name in kept else 1)
                parameter.grad = None
        for name, parameter in model.named_parameters():
            assert torch.allclose(parameter, twin.get_parameter(name))


def test_layers_in_gradient_mode_are_moved_by_momentum():
    model = dropped(tower(), "GradFreeze-Toggle-TopDown", num_epochs=3, frozen="gradient")
    optimizer, graddrop = adamw(model), GradDrop(model)
    graddrop.set_epoch(0)
    step(model, optimizer)
    before = {name: delta.detach().clone() for name, delta in deltas(model).items()}
    graddrop.set_epoch(1)
    step(model, optimizer)
    assert all((delta != before[name]).all() for name, delta in deltas(model).items() if name.startswith("layers.2"))


def test_held_entries_move_again_when_they_are_freed():
    model = dropped(tower(), "GradFreeze-BottomUp", num_epochs=3)
    optimizer, graddrop = adamw(model), GradDrop(model)
    for epoch in range(3):
        graddrop.set_epoch(epoch)
        for seed in range(3):
            step(model, optimizer, seed)
        moved = {int(name.split(".")[1]) for name, delta in deltas(model).items() if delta.any()}
        assert moved == set(range(epoch + 1))


def test_gradient_from_before_the_mask_changed_does_not_move_a_held_layer():
    model = dropped(tower(), "GradFreeze-Toggle-TopDown", num_epochs=3)
    optimizer, graddrop = adamw(model), GradDrop(model)
    graddrop.set_epoch(0)
    loss_of(model).backward()
    graddrop.set_epoch(1)
    optimizer.step()
    assert not any(delta.any() for name, delta in deltas(model).items())


def test_noise_holds_nothing():
    model = dropped(tower(), noise="gaussian", frozen="hold", p=0.5)
    step(model, adamw(model))
    assert all(delta.all() for delta in deltas(model).values())


# Others in the process


def test_unrelated_model_trains_as_without_graddrop():
    model = dropped(tower(), p=0.9, frozen="hold")
    loss_of(model).backward()
    bystander, twin = tower(), tower()
    optimizer = torch.optim.AdamW(bystander.parameters(), lr=0.01, weight_decay=0.1)
    for number in range(3):
        step(bystander, optimizer, number)
    expected = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.1)
    for number in range(3):
        step(twin, expected, number)
    assert all(torch.equal(p, twin.get_parameter(name)) for name, p in bystander.named_parameters())
    assert masks_of(model).step == 0
    assert all(delta.grad is not None for delta in deltas(model).values())


def test_hooks_are_registered_once():
    from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

    dropped(tower())
    before = len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)
    dropped(tower())
    GradDrop(tower(), GradDropConfig())
    assert (len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)) == before


@pytest.mark.parametrize("settings", [{"p": 0.5, "frozen": "hold"}, {"granularity": "layer"}], ids=str)
def test_nothing_is_kept_between_steps(settings):
    model = dropped(tower(), **settings)
    optimizer = adamw(model)
    step(model, optimizer)
    assert optimizer not in optimizer_watcher._RUNNING


@pytest.mark.parametrize("kind", ["adapter", "plain"])
def test_deleted_model_and_optimizer_are_freed(kind):
    gc.collect()
    if kind == "adapter":
        model, graddrop = dropped(tower(), p=0.5, frozen="hold"), None
    else:
        model = tower()
        graddrop = GradDrop(model, GradDropConfig(p=0.5, frozen="hold"))
    optimizer = adamw(model)
    step(model, optimizer)
    dead = [weakref.ref(thing) for thing in (model, optimizer, *model.parameters())]
    del model, optimizer, graddrop
    gc.collect()
    assert not any(reference() for reference in dead)


def test_dropped_reference_to_graddrop_does_not_take_the_masks_off_quietly():
    """`GradDrop(model, config)` without keeping the object: gradients stay masked, so entries must stay held."""
    model = tower()
    GradDrop(model, GradDropConfig(p=0.5, frozen="hold"))
    gc.collect()
    optimizer = adamw(model, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model, optimizer)
    moved = torch.cat([(p != before[n]).flatten() for n, p in model.named_parameters() if n.startswith("layers.")])
    assert 0.4 < moved.double().mean() < 0.6


# Models without a GradDrop adapter


def names(graddrop):
    return {masked.name for masked in graddrop.masked_parameters()}


def test_plain_model_is_masked_inside_its_blocks():
    model = bert()
    graddrop = GradDrop(model, GradDropConfig())
    assert names(graddrop) == {n for n, _ in model.named_parameters() if n.startswith("bert.encoder.layer.")}


def test_embeddings_and_head_are_masked_when_they_are_named():
    graddrop = GradDrop(llama(), GradDropConfig(target_modules=["embed_tokens", "lm_head", "q_proj"]))
    blocks = {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3)}
    assert names(graddrop) == {"model.embed_tokens.weight", "lm_head.weight", *blocks}
    assert {m.block for m in graddrop.masked_parameters() if "layers" not in m.name} == {
        "model.embed_tokens",
        "lm_head",
    }


def test_frozen_parameters_are_left_out():
    model = llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("down_proj" in name or "lm_head" in name)
    assert names(GradDrop(model, GradDropConfig())) == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)}


def test_lora_matrices_are_masked_and_the_head_is_not():
    model = get_peft_model(
        bert(), LoraConfig(target_modules=["query", "dense"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    )
    graddrop = GradDrop(model, GradDropConfig())
    inside = {n for n, p in model.named_parameters() if p.requires_grad and "encoder.layer" in n}
    assert names(graddrop) == inside
    assert len(inside) == 2 * (1 + 3) * 2
    assert not any("classifier" in name or "pooler" in name for name in names(graddrop))


def test_lora_matrices_move_where_the_mask_keeps_them():
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    graddrop = GradDrop(model, GradDropConfig(p=0.5, frozen="hold"))
    masked = {m.name: (m.parameter, m.block) for m in graddrop.masked_parameters()}
    optimizer = adamw(model)
    for number in range(3):
        before = {name: parameter.detach().clone() for name, (parameter, _) in masked.items()}
        model(**batch(number)).loss.backward()
        kept = kept_now(graddrop.samplers[0], masked)
        optimizer.step()
        optimizer.zero_grad()
        for name, (parameter, _) in masked.items():
            assert not (parameter != before[name])[~kept[name]].any()
            assert (parameter != before[name])[kept[name]].double().mean() > 0.95


def test_sparsegrad_values_are_masked():
    model = adapted()
    graddrop = GradDrop(model, GradDropConfig(p=0.5, frozen="hold"))
    values = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert names(graddrop) == set(values)
    before = {name: value.detach().clone() for name, value in values.items()}
    train(model, steps=1)
    for masked in graddrop.masked_parameters():
        kept = graddrop.samplers[0].mask(masked.name, masked.block).keep(masked.parameter.shape, torch.device("cpu"))
        assert torch.equal(masked.parameter != before[masked.name], kept)


def test_exclude_modules():
    graddrop = GradDrop(llama(), GradDropConfig(exclude_modules=["mlp", "q_proj"]))
    assert not any("mlp" in name or "q_proj" in name for name in names(graddrop))
    assert len(names(graddrop)) == 3 * (3 + 2)


@pytest.mark.parametrize("indices", [1, [0, 2], [0, 1, 2]])
def test_layers_to_transform(indices):
    graddrop = GradDrop(llama(), GradDropConfig(layers_to_transform=indices))
    numbers = {int(name.split(".")[2]) for name in names(graddrop)}
    assert numbers == set(indices if isinstance(indices, list) else [indices])
    assert len(names(graddrop)) == 9 * len(numbers)


def test_layers_to_transform_of_named_targets():
    graddrop = GradDrop(llama(), GradDropConfig(layers_to_transform=[1], target_modules=["mlp"]))
    assert names(graddrop) == {f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}


def test_regular_expression():
    graddrop = GradDrop(llama(), GradDropConfig(target_modules=r".*\.1\.mlp"))
    assert names(graddrop) == {f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}


def test_all_linear_masks_every_linear_layer_but_the_head():
    graddrop = GradDrop(llama(), GradDropConfig(target_modules="all-linear"))
    assert len(names(graddrop)) == 3 * 7
    assert all(name.endswith("_proj.weight") for name in names(graddrop))


def test_name_of_a_parameter_is_no_target():
    with pytest.raises(ValueError, match="found nothing to mask"):
        GradDrop(llama(), GradDropConfig(target_modules=["weight"]))


def test_settings_are_not_changed():
    config = GradDropConfig(layers_to_transform=[1])
    GradDrop(llama(), config)
    assert config == GradDropConfig(layers_to_transform=[1])


def test_layers_are_the_models_blocks():
    graddrop = GradDrop(tower(), GradDropConfig.from_variant("GradFreeze-TopDown", num_epochs=3))
    assert graddrop.samplers[0].blocks == ["layers.0", "layers.1", "layers.2"]


def test_masked_layer_of_a_plain_model_is_passed_over_by_the_optimizer():
    model = tower()
    graddrop, optimizer = (
        GradDrop(model, GradDropConfig.from_variant("GradFreeze-TopDown", num_epochs=3)),
        adamw(model),
    )
    graddrop.set_epoch(0)
    step(model, optimizer)
    for name, parameter in model.named_parameters():
        assert (len(optimizer.state[parameter]) > 0) == (not name.startswith(("layers.0", "layers.1")))


def test_remove_takes_everything_off():
    model, twin = tower(), tower()
    graddrop = GradDrop(model, GradDropConfig(p=0.9, frozen="hold"))
    graddrop.remove()
    for which in (model, twin):
        optimizer = adamw(which, weight_decay=0.1)
        for number in range(3):
            step(which, optimizer, number)
    assert all(torch.equal(p, twin.get_parameter(name)) for name, p in model.named_parameters())
    assert not any(p._backward_hooks for p in model.parameters())
    assert all(each is not graddrop for each in observers())
    assert graddrop.masked_parameters() == []
    graddrop.remove()


def test_adapter_keeps_its_masks_when_graddrop_is_removed():
    model = dropped(tower(), p=0.5)
    GradDrop(model).remove()
    loss_of(model).backward()
    zeros = torch.cat([(delta.grad == 0).flatten() for delta in deltas(model).values()])
    assert 0.4 < zeros.double().mean() < 0.6
    step(model, sgd(model))


def test_masks_count_the_steps_of_a_plain_model():
    model = tower()
    graddrop, optimizer = GradDrop(model, GradDropConfig()), sgd(model)
    for number in range(3):
        loss_of(model, number).backward()
        loss_of(model, number).backward()
        assert graddrop.samplers[0].step == number
        optimizer.step()
        optimizer.zero_grad()


def test_gradient_that_comes_expanded_is_masked():
    """The gradient of a sum of a parameter is one number, seen many times."""
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(16, 16))])})
    GradDrop(model, GradDropConfig(p=0.5, scale=False))
    linear = model["layers"][0][0]
    linear.weight.sum().backward()
    assert 0.3 < linear.weight.grad.mean() < 0.7


def test_gradient_in_another_layout_is_masked_at_the_same_entries():
    kept = []
    for layout in (lambda w: w, lambda w: w.t()):
        model = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(16, 16))])})
        graddrop = GradDrop(model, GradDropConfig(p=0.5, scale=False))
        weight = model["layers"][0][0].weight
        layout(weight).mul(torch.rand(16, 16) + 1).sum().backward()
        kept.append(weight.grad != 0)
        mask = graddrop.samplers[0].mask("layers.0.0.weight", "layers.0")
        assert torch.equal(kept[-1], mask.keep(weight.shape, weight.device))
    assert torch.equal(*kept)


# The report


def test_report_of_a_fresh_adapter():
    assert GradDrop(dropped(tower(), p=0.25)).report() == {"rate": 0.25, "active": 0.75, "moved": 0.0}


def test_report_of_an_adapter_after_a_step():
    model = dropped(tower(), p=0.5)
    graddrop = GradDrop(model)
    step(model, sgd(model))
    moved = torch.cat([(delta != 0).flatten() for delta in deltas(model).values()]).double().mean().item()
    assert graddrop.report() == pytest.approx({"rate": 0.5, "active": 0.5, "moved": moved})


@pytest.mark.parametrize("kind", ["adapter", "plain"])
def test_report_of_layers_that_are_unfrozen(kind):
    config = GradDropConfig.from_variant("GradFreeze-TopDown", num_epochs=3)
    model = get_peft_model(tower(), config) if kind == "adapter" else tower()
    graddrop, optimizer = GradDrop(model, None if kind == "adapter" else config), sgd(model)
    for epoch in range(3):
        graddrop.set_epoch(epoch)
        step(model, optimizer)
        share = (epoch + 1) / 3
        assert graddrop.report() == pytest.approx({"rate": 1 - share, "active": share, "moved": share})


def test_report_weighs_parameters_by_their_size():
    model = dropped(tower(num_blocks=2), "Layer-GradDrop", p=0.5, target_modules=[r"layers.0.up", "layers.1.norm"])
    graddrop = GradDrop(model)
    sizes = {"layers.0": 8 * 16 + 16, "layers.1": 16}
    for number in range(8):
        graddrop.set_step(number)
        active = sum(size for block, size in sizes.items() if masks_of(model).trains("", block))
        assert graddrop.report()["active"] == pytest.approx(active / 160)


def test_report_of_large_parameters_looks_at_a_sample():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(200, 100, bias=False))])})
    graddrop = GradDrop(model, GradDropConfig())
    weight = model["layers"][0][0].weight
    with torch.no_grad():
        weight[:50] += 1
    assert graddrop.report()["moved"] == pytest.approx(0.5, abs=0.01)
    assert sum(sample.numel() for _, sample in graddrop._before) <= 4096


def test_report_counts_active_adapters_only():
    model = dropped(tower(), p=0.5)
    model.add_adapter("other", GradDropConfig(p=0.25, init_weights=False))
    assert GradDrop(model).report() == {"rate": 0.5, "active": 0.5, "moved": 0.0}
    model.set_adapter("other")
    assert GradDrop(model).report() == {"rate": 0.25, "active": 0.75, "moved": 1.0}


# What is refused


def test_nothing_to_mask():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(
        ValueError, match="found nothing to mask: no parameter that trains is inside a transformer block"
    ):
        GradDrop(model, GradDropConfig())
    with pytest.raises(ValueError, match=r"`target_modules=\{'nowhere'\}`"):
        GradDrop(model, GradDropConfig(target_modules=["nowhere"]))
    with pytest.raises(ValueError, match="found nothing to mask"):
        GradDrop(tower().requires_grad_(False), GradDropConfig())


def test_settings_for_a_model_that_has_its_own():
    with pytest.raises(ValueError, match="settings of its own: leave `config` out"):
        GradDrop(dropped(tower()), GradDropConfig())


def test_no_adapter_and_no_settings():
    with pytest.raises(ValueError, match="no active GradDrop adapter: give a `GradDropConfig`"):
        GradDrop(tower())
    with pytest.raises(ValueError, match="no active GradDrop adapter"):
        GradDrop(get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])))


def test_refusal_of_the_number_of_epochs_leaves_no_hooks():
    model = tower()
    with pytest.raises(ValueError, match="`toggle`"):
        GradDrop(model, GradDropConfig.from_variant("GradFreeze-Toggle-TopDown"), num_epochs=9)
    assert not any(p._backward_hooks for p in model.parameters())
