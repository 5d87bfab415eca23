"""GradDrop on models that have no GradDrop adapter."""

import pytest
import torch
from graddrop_tools import adamw, dropped, kept_now, loss_of, sgd, step, tower
from peft import LoraConfig, get_peft_model
from tiny import adapted, batch, bert, llama, train
from torch import nn

from peft_sparsegrad import GradDrop, GradDropConfig
from peft_sparsegrad.sparsegrad.adapter import LayerAdapter


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


HELD = {
    "element, step": GradDropConfig(p=0.5, frozen="hold"),
    "layer, step": GradDropConfig(p=0.5, granularity="layer"),
    "element, epoch": GradDropConfig.from_variant("GradDrop-Epoch-Toggle", num_epochs=3),
    "layer, epoch": GradDropConfig.from_variant("GradFreeze-TopDown", num_epochs=3),
}


@pytest.mark.parametrize("kind", HELD)
def test_sparsegrad_values_are_held_through_the_renewals_of_their_supports(kind):
    model = adapted(warmup_steps=0, renewal_steps=2)
    graddrop, optimizer = GradDrop(model, HELD[kind]), adamw(model)
    adapters = {f"{name}.values": each for name, each in model.named_modules() if isinstance(each, LayerAdapter)}
    renewed = 0
    for number in range(12):
        graddrop.set_epoch(number // 4)
        masked = {m.name: (m.parameter, m.block) for m in graddrop.masked_parameters()}
        before = {name: (values.detach().clone(), adapters[name].indices) for name, (values, _) in masked.items()}
        model(**batch(number)).loss.backward()
        kept = kept_now(graddrop.samplers[0], masked)
        optimizer.step()
        optimizer.zero_grad()
        for name, (values, _) in masked.items():
            earlier, indices = before[name]
            new = adapters[name].indices != indices
            renewed += int(new.sum())
            assert not values[new].any()
            assert torch.equal((values != earlier)[~new], kept[name][~new])
    assert renewed


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


def test_masks_count_the_steps_of_a_plain_model():
    model = tower()
    graddrop, optimizer = GradDrop(model, GradDropConfig()), sgd(model)
    for number in range(3):
        loss_of(model, number).backward()
        loss_of(model, number).backward()
        assert graddrop.samplers[0].progress.step == number
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
