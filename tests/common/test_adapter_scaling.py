"""The factor of a delta by LoRA's method names: the same calls give LoRA and ours the same share of their deltas."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale as rescale_lora
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny import adapted, batch, llama

from peft_sparsegrad import GradDropConfig, SparseGradConfig, convert_to_lora, rescale_adapter_scale

TARGETS = ["up_proj", "down_proj"]
METHODS = {
    "lora": lambda: LoraConfig(target_modules=TARGETS, r=4, lora_alpha=4),
    "sparsegrad": lambda: SparseGradConfig(target_modules=TARGETS, warmup_steps=0, density=0.05),
    "graddrop": lambda: GradDropConfig(p=0.0),
}
OURS = ["sparsegrad", "graddrop"]


def two_adapters(method):
    """A model in float64 whose adapters "default" and "other" have deltas that are not zero; "default" is active."""
    model = get_peft_model(llama().double(), METHODS[method]())
    model.add_adapter("other", METHODS[method]())
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_B", "sparsegrad_adapter", "graddrop_adapter")):
            parameter.data.normal_(std=0.2)
    return model.eval()


def layers(model) -> list:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def each(model, method_name, *args):
    for layer in layers(model):
        getattr(layer, method_name)(*args)


def deltas(model, adapter="default"):
    return [layer.get_delta_weight(adapter) for layer in layers(model)]


@torch.no_grad()
def outputs(model):
    return model(input_ids=batch()["input_ids"]).logits


def times_by_hand(model, factor, adapter="default"):
    """The slow twin: a copy whose tensors have the factor, and no scale."""
    copy = deepcopy(model)
    each(copy, "set_scale", adapter, 1.0)
    for name, parameter in copy.named_parameters():
        if f".{adapter}." in name and any(part in name for part in ("lora_B", "values", "_delta")):
            parameter.data.mul_(factor)
    return copy


CALLS = {
    "set_scale": ([("set_scale", "default", 0.25), ("set_scale", "default", -0.5), ("set_scale", "else", 3)], -0.5),
    "scale_layer": ([("scale_layer", 0.25), ("scale_layer", 3)], 0.75),
    "unscale_layer": ([("scale_layer", 0.25), ("unscale_layer", 0.5)], 0.5),
    "reset": ([("scale_layer", 0.25), ("unscale_layer",)], 1.0),
    "zero": ([("scale_layer", 0.0)], 0.0),
    "numpy": ([("set_scale", "default", np.float32(0.5))], 0.5),
    "tensor": ([("scale_layer", torch.tensor(0.5)), ("unscale_layer", torch.tensor(2)), ("scale_layer", 2)], 0.5),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("calls", CALLS)
def test_the_delta_has_the_factor_wherever_it_is_added(method, calls):
    model = two_adapters(method)
    steps, factor = CALLS[calls]
    for call in steps:
        each(model, *call)
    twin = times_by_hand(model, factor)
    expected = outputs(twin)
    torch.testing.assert_close(outputs(model), expected)
    assert {float(layer.scaling["default"]) for layer in layers(model)} == {factor}  # LoRA keeps a tensor
    assert {layer.scaling["other"] for layer in layers(model)} == {1.0}
    for ours, by_hand in zip(deltas(model), deltas(twin), strict=True):
        torch.testing.assert_close(ours, by_hand)
    model.merge_adapter()
    torch.testing.assert_close(outputs(model), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(outputs(model), expected)


@pytest.mark.parametrize("method", METHODS)
def test_adapters_are_weighted_as_diffusers_weights_them(method):
    """Its `set_adapters` activates the names on every tuner layer and calls `set_scale` with each weight."""
    model = two_adapters(method)
    each(model, "set_adapter", ["default", "other"])
    for name, weight in (("default", 0.3), ("other", 0.6)):
        each(model, "set_scale", name, weight)
    twin = times_by_hand(times_by_hand(model, 0.3), 0.6, "other")
    torch.testing.assert_close(outputs(model), outputs(twin))
    each(model, "scale_layer", 0.5)  # `scale_lora_layers`, then `unscale_lora_layers`
    each(model, "unscale_layer", 0.5)
    torch.testing.assert_close(outputs(model), outputs(twin))


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_a_mixed_batch_have_their_factors(method):
    model = two_adapters(method)
    each(model, "set_scale", "default", 0.5)
    rows = ["default", "other", "default", "__base__"] * 2
    with torch.no_grad():
        mixed = model(input_ids=batch()["input_ids"], adapter_names=rows).logits
        expected = times_by_hand(model, 0.5)(input_ids=batch()["input_ids"], adapter_names=rows).logits
    torch.testing.assert_close(mixed, expected)


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_has_the_factor(method):
    """As in LoRA: the loss depends on the tensors through it."""
    model = two_adapters(method).train()
    each(model, "set_scale", "default", 0.5)
    twin = times_by_hand(model, 0.5).train()
    for one in (model, twin):
        one(**batch()).loss.backward()
    pairs = [
        (ours, theirs)
        for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True)
        if ours.requires_grad and "lora_A" not in name
    ]
    assert pairs
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.grad, 0.5 * theirs.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_renewed_supports_are_those_of_the_scaled_deltas(dtype):
    """Steps of SGD on values with the factor c are steps on the deltas that are c² as long."""
    models = [adapted(llama().to(dtype), renewal_steps=2, density=0.1) for _ in range(2)]
    first = [layer.adapter("default").indices for layer in layers(models[0])]
    each(models[0], "set_scale", "default", 0.5)
    for model, rate in zip(models, (4.0, 1.0), strict=True):
        values = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(values, lr=rate)
        for step in range(8):
            (model(**batch(step)).loss / 2).backward()
            (model(**batch(step + 8)).loss / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
    supports = [[layer.adapter("default").indices for layer in layers(model)] for model in models]
    for ours, theirs, before in zip(*supports, first, strict=True):
        assert torch.equal(ours, theirs)
        assert not torch.equal(ours, before)
    for ours, theirs in zip(deltas(models[0]), deltas(models[1]), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_discarded_pass_does_not_count_for_the_renewal(dtype):
    """It is told by the gradients of values and core being equal, to the bit, after the gradient was set to zero."""
    sums = []
    for discarded in (False, True):
        model = adapted(llama().to(dtype), renewal_steps=9, density=0.1, init_weights=False)
        each(model, "set_scale", "default", 0.3)
        optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad])
        if discarded:
            model(**batch(1)).loss.backward()
            optimizer.zero_grad(set_to_none=False)
        model(**batch(0)).loss.backward()
        optimizer.step()
        sums.append([layer.adapter("default").gradient_sum for layer in layers(model)])
    for without, with_one in zip(*sums, strict=True):
        assert torch.equal(without, with_one)
        assert without.any()


@pytest.mark.parametrize("method", METHODS)
def test_a_factor_is_in_no_file(method, tmp_path):
    model = two_adapters(method)
    before = outputs(model)
    each(model, "scale_layer", 0.5)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    torch.testing.assert_close(outputs(PeftModel.from_pretrained(llama().double(), tmp_path)), before)


def test_a_conversion_to_lora_has_the_factor(tmp_path):
    model = two_adapters("sparsegrad")
    each(model, "set_scale", "default", 0.5)
    convert_to_lora(model).save(tmp_path)
    torch.testing.assert_close(outputs(PeftModel.from_pretrained(llama().double(), tmp_path)), outputs(model))


@pytest.mark.parametrize("method", METHODS)
def test_rescaling_in_a_block(method):
    model = two_adapters(method)
    each(model, "set_scale", "default", 0.5)
    before, expected = outputs(model), outputs(times_by_hand(model, 0.25))
    with (rescale_lora if method == "lora" else rescale_adapter_scale)(model, 0.5):
        torch.testing.assert_close(outputs(model), expected)
    torch.testing.assert_close(outputs(model), before)


@pytest.mark.parametrize("method", OURS)
def test_a_merge_inside_such_a_block_can_be_undone_after_it(method):
    """LoRA subtracts another delta than it has added."""
    model = two_adapters(method)
    before = outputs(model)
    with rescale_adapter_scale(model, 0.5):
        model.merge_adapter()
        expected = outputs(model)
    torch.testing.assert_close(outputs(model), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(outputs(model), before)


@pytest.mark.parametrize("method", OURS)
def test_the_factor_of_a_merged_adapter_is_refused(method):
    """LoRA takes it, without an effect until the adapter is unmerged, and then subtracts another delta."""
    model = two_adapters(method)
    model.merge_adapter()
    before = outputs(model)
    with pytest.raises(ValueError, match=r"`scale` of 'default' cannot become 0.5 .* `model.unmerge_adapter\(\)`"):
        each(model, "set_scale", "default", 0.5)
    with pytest.raises(ValueError, match="unmerge"), rescale_adapter_scale(model, 0.5):
        pass
    each(model, "set_scale", "default", 1.0)
    each(model, "set_scale", "other", 0.5)
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("set_scale", "default", float("nan")), "`scale` must be a finite number, not nan"),
        (("set_scale", "nowhere", float("inf")), "`scale` must be a finite number, not inf"),
        (("scale_layer", float("-inf")), "`scale` must be a finite number, not -inf"),
        (("scale_layer", "2"), "`scale` must be a finite number, not '2'"),
        (("scale_layer", torch.ones(1)), r"`scale` must be a finite number, not tensor\(\[1"),
        (("scale_layer", torch.tensor(True)), "`scale` must be a finite number, not True"),
        (("scale_layer", torch.tensor(float("nan"))), "`scale` must be a finite number, not nan"),
        (("unscale_layer", float("nan")), "`scale` must be a finite number, not nan"),
        (("unscale_layer", 0), "`scale` must not be 0 in `unscale_layer`.* leave it out"),
    ],
)
def test_what_is_no_factor_is_refused(method, call, message):
    model = two_adapters(method)
    with pytest.raises(ValueError, match=message):
        each(model, *call)
    assert {scale for layer in layers(model) for scale in layer.scaling.values()} == {1.0}


def test_items_of_scaling_are_checked_too():
    layer = layers(two_adapters("sparsegrad"))[0]
    layer.scaling["default"] *= 0.5
    assert dict(layer.scaling) == {"default": 0.5, "other": 1.0}
    with pytest.raises(ValueError, match="must be a finite number, not nan"):
        layer.scaling["default"] = float("nan")
    with pytest.raises(KeyError):
        layer.scaling["nowhere"] = 1.0
    with pytest.raises(AttributeError, match="scaling"):
        layer.scaling = {"default": 2.0}


def test_models_without_our_layers_are_refused():
    without = rescale_adapter_scale(two_adapters("lora"), 0.5)
    with pytest.raises(ValueError, match=r"no SparseGrad or GradDrop adapter: for LoRA use `peft.helpers`"), without:
        pass
    unfit = rescale_adapter_scale(two_adapters("sparsegrad"), float("nan"))
    with pytest.raises(ValueError, match="`multiplier` must be a finite number, not nan"), unfit:
        pass


@pytest.mark.parametrize("config", [SparseGradConfig, GradDropConfig])
def test_scaling_is_a_view(config):
    model = get_peft_model(llama(), config(), adapter_name="gone")
    model.add_adapter("kept", config())
    layer = next(module for module in model.modules() if hasattr(module, "scale_layer"))
    scaling = layer.scaling
    assert dict(scaling) == {"gone": 1.0, "kept": 1.0}
    model.delete_adapter("gone")
    layer.set_scale("kept", 0.5)
    assert dict(scaling) == {"kept": 0.5}
