"""The layers through PEFT's public API, held to a plain copy of the model with masked gradients."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from graddrop_tools import adamw, deltas, dropped, graddrop_layers, loss_of, masks_of, sgd, step, tower
from peft import PeftModel, get_peft_model
from tiny import batch, bert, llama, logits, train
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from peft_sparsegrad import GradDrop, GradDropConfig


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, **kwargs):
        return self.layer(x, **kwargs)


def conv(**settings):
    return lambda: nn.Conv2d(4, 6, **{"kernel_size": 3, **settings}), (2, 4, 9, 8)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (2, 3, 6)),
    "linear, two dimensions": (lambda: nn.Linear(6, 5), (3, 6)),
    "linear, one dimension": (lambda: nn.Linear(6, 5), (6,)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (2, 3, 6)),
    "conv1d": (lambda: Conv1D(5, 6), (2, 3, 6)),
    "conv": conv(),
    "conv, one image": (conv()[0], (4, 9, 8)),
    "conv without bias": conv(bias=False),
    "conv, stride": conv(stride=2, padding=1),
    "conv, uneven stride": conv(stride=(2, 3), padding=(1, 0)),
    "conv, dilation": conv(dilation=2, padding=2),
    "conv, groups": conv(groups=2, padding=1),
    "conv, depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 9, 8)),
    "conv, same": conv(padding="same", dilation=2),
    "conv, same with an even kernel": conv(padding="same", kernel_size=(2, 4)),
    "conv, valid": conv(padding="valid"),
    "conv, circular": conv(padding=1, padding_mode="circular"),
    "conv, reflect": conv(padding=(1, 2), padding_mode="reflect", stride=2),
    "conv, replicate": conv(padding="same", padding_mode="replicate"),
    "layer norm": (lambda: nn.LayerNorm(6), (2, 3, 6)),
    "layer norm without bias": (lambda: nn.LayerNorm(6, bias=False), (2, 3, 6)),
    "rms norm": (lambda: nn.RMSNorm(6), (2, 3, 6)),
    "llama's rms norm": (lambda: LlamaRMSNorm(6), (2, 3, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (2, 4, 3, 3)),
}
SETTINGS = {
    "scaled": {"p": 0.5},
    "unscaled": {"p": 0.5, "scale": False},
    "plain": {"p": 0.0},
    "held": {"p": 0.5, "frozen": "hold"},
}


def made(kind, **settings):
    """A base layer, and a copy of it with an adapter that is not zero; both in float64."""
    if kind in LAYERS:
        layer, shape = LAYERS[kind][0]().double(), LAYERS[kind][1]
    else:
        layer, shape = nn.Embedding(7, 5, padding_idx=2).double(), (3, 4)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    config = GradDropConfig(target_modules=["layer"], init_weights=False, **settings)
    model = get_peft_model(One(copy.deepcopy(layer)), config)
    x = torch.randint(0, 7, shape) if kind == "embedding" else torch.randn(shape, dtype=torch.float64)
    return layer, model, x


def twin_step(layer, model, x, lr: float = 0.0):
    """Set the twin's weights to W + delta, return output, the input's gradient and the masked gradients, and step."""
    (peft_layer,) = graddrop_layers(model).values()
    masks = masks_of(model)
    masks.begin_pass()
    x = x.clone().requires_grad_(x.is_floating_point())
    y = layer(x)
    y.square().sum().backward()
    masked = {}
    for name, parameter in layer.named_parameters():
        mask = masks.mask(f"layer.{name}", peft_layer.graddrop_block)
        keep = mask.keep(parameter.shape, parameter.device)
        masked[f"layer.{name}"] = torch.where(keep, parameter.grad * mask.factor, torch.zeros(()).double())
        with torch.no_grad():
            parameter -= lr * masked[f"layer.{name}"]
        parameter.grad = None
    return y, x.grad, masked


def add_deltas(layer, model):
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter += deltas(model)[f"layer.{name}"]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", [*LAYERS, "embedding"])
def test_output_and_gradients_are_those_of_a_plain_layer_with_masked_gradients(kind, settings):
    layer, model, x = made(kind, **SETTINGS[settings])
    add_deltas(layer, model)
    own = x.clone().requires_grad_(x.is_floating_point())
    y = model(own)
    y.square().sum().backward()
    expected_y, expected_dx, masked = twin_step(layer, model, x)
    assert torch.allclose(y, expected_y)
    assert own.grad is None if expected_dx is None else torch.allclose(own.grad, expected_dx)
    assert deltas(model).keys() == masked.keys()
    for name, delta in deltas(model).items():
        assert torch.allclose(delta.grad, masked[name])
        assert torch.equal(delta.grad == 0, masked[name] == 0)


@pytest.mark.parametrize("kind", [*LAYERS, "embedding"])
def test_merged_weights_after_training_are_the_plain_layers(kind):
    layer, model, x = made(kind, p=0.5)
    add_deltas(layer, model)
    optimizer = sgd(model, lr=1e-3)
    for _ in range(4):
        model(x).square().sum().backward()
        twin_step(layer, model, x, lr=1e-3)
        optimizer.step()
        optimizer.zero_grad()
    merged = model.merge_and_unload().layer
    assert type(merged) is type(layer)
    for name, parameter in layer.named_parameters():
        assert torch.allclose(merged.get_parameter(name), parameter, atol=1e-12)


@pytest.mark.parametrize("kind", [*LAYERS, "embedding"])
def test_base_weight_gets_no_gradient_and_stays(kind):
    layer, model, x = made(kind)
    optimizer = sgd(model)
    model(x).square().sum().backward()
    optimizer.step()
    for name, parameter in layer.named_parameters():
        own = model.base_model.model.layer.base_layer.get_parameter(name)
        assert own.grad is None
        assert not own.requires_grad
        assert torch.equal(own, parameter)


@pytest.mark.parametrize("kind", [*LAYERS, "embedding"])
def test_zero_delta_changes_nothing(kind):
    layer, model, x = made(kind)
    for delta in deltas(model).values():
        delta.data.zero_()
    assert torch.equal(model(x), layer(x))


@pytest.mark.parametrize("make", [llama, bert])
def test_fresh_adapter_changes_nothing(make):
    expected = logits(make())
    assert torch.equal(logits(dropped(make())), expected)


@pytest.mark.parametrize("kind", [*LAYERS, "embedding"])
@pytest.mark.parametrize("safe_merge", [True, False])
def test_disable_merge_and_unmerge(kind, safe_merge):
    layer, model, x = made(kind)
    model.eval()
    layer.eval()
    expected, base = model(x), layer(x)
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    assert not torch.allclose(expected, base)
    model.merge_adapter(safe_merge=safe_merge)
    assert torch.allclose(model(x), expected)
    with model.disable_adapter():
        assert torch.allclose(model(x), base)
    model.merge_adapter(safe_merge=safe_merge)
    model.unmerge_adapter()
    assert torch.allclose(model(x), expected)
    for name, parameter in layer.named_parameters():
        assert torch.allclose(model.base_model.model.layer.base_layer.get_parameter(name), parameter)


def test_merging_twice_merges_once():
    model = dropped(init_weights=False)
    expected = logits(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="merged"):
        model.merge_adapter()
    assert torch.allclose(logits(model), expected, atol=1e-4)


def test_unmerging_what_is_not_merged_warns():
    with pytest.warns(UserWarning, match="Already unmerged"):
        dropped().unmerge_adapter()


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_safe_merge_refuses_nan_and_leaves_the_layer(kind):
    model = dropped(bert(), init_weights=False)
    name = next(name for name in deltas(model) if name.endswith(kind))
    layer = graddrop_layers(model)[name.rpartition(".")[0]]
    before = copy.deepcopy(layer.get_base_layer().state_dict())
    with torch.no_grad():
        deltas(model)[name].view(-1)[0] = float("nan")
    with pytest.raises(
        ValueError, match=r"^NaNs detected in the merged weights\. The adapter default seems to be broken$"
    ):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(layer.get_base_layer().state_dict()[key], value) for key, value in before.items())
    assert not layer.merged


def two_adapters():
    model = dropped(tower(), p=0.5, seed=1, init_weights=False)
    model.add_adapter("other", GradDropConfig(p=0.5, seed=2, init_weights=False, target_modules=["up", "norm"]))
    return model


def test_two_active_adapters_add_up_and_have_masks_of_their_own():
    model = two_adapters()
    model.base_model.set_adapter(["default", "other"])
    loss_of(model).backward()
    plain = tower()
    with torch.no_grad():
        for adapter in ("default", "other"):
            for name, delta in deltas(model, adapter).items():
                plain.get_parameter(name).add_(delta)
    loss_of(plain).backward()
    for adapter in ("default", "other"):
        for name, delta in deltas(model, adapter).items():
            keep = (
                masks_of(model, "default")
                if adapter == "default"
                else graddrop_layers(model)["layers.0.up"].graddrop_sampler["other"]
            )
            mask = keep.mask(name, "")
            expected = plain.get_parameter(name).grad * mask.keep(delta.shape, delta.device) * mask.factor
            assert torch.allclose(delta.grad, expected)
    first, second = deltas(model)["layers.0.up.weight"].grad, deltas(model, "other")["layers.0.up.weight"].grad
    assert not torch.equal(first != 0, second != 0)


def test_adapter_that_is_not_active_gets_no_gradient():
    model = two_adapters()
    loss_of(model).backward()
    assert all(delta.grad is None and not delta.requires_grad for delta in deltas(model, "other").values())


def test_two_adapters_switch_merge_and_are_deleted():
    model = two_adapters()
    x = torch.randn(5, 8, dtype=torch.float64)
    first = model(x)
    model.set_adapter("other")
    second = model(x)
    model.base_model.set_adapter(["default", "other"])
    both = model(x)
    assert not torch.allclose(first, second)
    assert not torch.allclose(both, second)
    model.merge_adapter()
    assert torch.allclose(model(x), both)
    model.unmerge_adapter()
    model.set_adapter("other")
    model.merge_adapter(adapter_names=["other"])
    assert [layer.merged_adapters for layer in graddrop_layers(model).values()] == 3 * [["other"], ["other"], []]
    assert torch.allclose(model(x), second)
    model.unmerge_adapter()
    model.base_model.set_adapter(["other"])
    model.delete_adapter("default")
    assert torch.allclose(model(x), second)
    assert not any("default" in key for key in model.state_dict())
    assert not any("default" in layer.graddrop_sampler for layer in graddrop_layers(model).values())
    step(model, sgd(model))


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(saved_in_memory(model), weights_only=False),
}


def saved_in_memory(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("variant", ["GradDrop", "Layer-GradDrop"])
def test_copy_goes_on_like_the_original(how, variant):
    model = dropped(tower(), variant, p=0.5)
    step(model, sgd(model))
    twin = COPIES[how](model)
    for which in (model, twin):
        optimizer = sgd(which)
        for seed in range(3):
            step(which, optimizer, seed)
    assert masks_of(twin) is not masks_of(model)
    assert masks_of(twin).step == masks_of(model).step == 3
    assert all(torch.equal(deltas(twin)[name], delta) for name, delta in deltas(model).items())


@pytest.mark.parametrize("how", COPIES)
def test_copy_is_held_too(how):
    twin = COPIES[how](dropped(tower(), "GradDrop-Epoch", num_epochs=2))
    GradDrop(twin).set_epoch(0)
    optimizer = adamw(twin, weight_decay=0.5)
    for delta in deltas(twin).values():
        delta.data.fill_(1.0)
    step(twin, optimizer)
    moved = torch.cat([(delta != 1.0).flatten() for delta in deltas(twin).values()])
    assert 0.4 < moved.double().mean() < 0.6


@pytest.mark.parametrize("how", COPIES)
def test_copy_does_not_advance_the_original(how):
    model = dropped(tower())
    twin = COPIES[how](model)
    optimizer = sgd(twin)
    for seed in range(3):
        step(twin, optimizer, seed)
    assert (masks_of(model).step, masks_of(twin).step) == (0, 2)


def test_copy_shares_one_set_of_masks_among_its_layers():
    twin = copy.deepcopy(dropped(tower()))
    assert len({id(layer.graddrop_sampler["default"]) for layer in graddrop_layers(twin).values()}) == 1


def test_bf16_base_keeps_float32_deltas_and_masks_them():
    model = dropped(llama().to(torch.bfloat16), p=0.5)
    assert {delta.dtype for delta in deltas(model).values()} == {torch.float32}
    model(**batch()).loss.backward()
    gradient = deltas(model)["model.layers.1.mlp.up_proj.weight"].grad
    keep = masks_of(model).mask("model.layers.1.mlp.up_proj.weight", "").keep(gradient.shape, gradient.device)
    assert gradient.dtype == torch.float32
    assert not gradient[~keep].any()
    assert gradient[keep].ne(0).double().mean() > 0.95


def test_bf16_adapter_on_request():
    config = GradDropConfig(p=0.5)
    model = get_peft_model(llama().to(torch.bfloat16), config, autocast_adapter_dtype=False)
    assert {delta.dtype for delta in deltas(model).values()} == {torch.bfloat16}
    model(**batch()).loss.backward()
    assert deltas(model)["model.layers.1.mlp.up_proj.weight"].grad.dtype == torch.bfloat16


@pytest.mark.parametrize("make", [llama, bert])
def test_autocast_gives_masked_gradients_in_float32(make):
    model, plain = dropped(make().eval(), p=0.5), dropped(make().eval(), p=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(input_ids=batch()["input_ids"]).logits
    output.float().square().sum().backward()
    plain(input_ids=batch()["input_ids"]).logits.square().sum().backward()
    name = next(name for name in deltas(model) if name.endswith("v_proj.weight") or name.endswith("value.weight"))
    gradient, expected = deltas(model)[name].grad, deltas(plain)[name].grad
    assert gradient.dtype == torch.float32
    assert torch.equal(gradient != 0, expected != 0)
    assert torch.nn.functional.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv", "conv, same"])
def test_autocast_computes_in_its_dtype_as_the_base_layer_does(kind):
    layer, model, x = made(kind)
    layer, model, x = layer.float(), model.float(), x.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("variant", ["GradDrop", "Layer-GradDrop"])
def test_gradient_checkpointing_trains_the_same(use_reentrant, variant):
    plain = dropped(llama(), variant, p=0.5, target_modules=["up_proj", "v_proj"])
    model = dropped(llama(), variant, p=0.5, target_modules=["up_proj", "v_proj"])
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for which in (plain, model):
        train(which.train(), steps=4, optimizer=sgd(which, lr=0.5))
    assert masks_of(model).step == masks_of(plain).step == 3
    for name, delta in deltas(plain).items():
        assert torch.allclose(deltas(model)[name], delta, atol=1e-6)
        assert torch.equal(deltas(model)[name] != 0, delta != 0)


@pytest.mark.parametrize("variant", ["GradDrop", "Layer-GradDrop"])
def test_compiled_model_trains_the_same(variant):
    plain, model = dropped(tower(), variant, p=0.5), dropped(tower(), variant, p=0.5)
    compiled = torch.compile(model, backend="eager")
    for which in (plain, compiled):
        optimizer = adamw(which)
        for seed in range(4):
            step(which, optimizer, seed)
    assert masks_of(model).step == 3
    assert all(torch.allclose(deltas(model)[name], delta) for name, delta in deltas(plain).items())
    assert torch.allclose(loss_of(compiled), loss_of(plain))


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reload_is_exact_and_masked(tmp_path, low_cpu_mem_usage, dtype):
    model = dropped(llama().to(dtype), "Layer-GradDrop", p=0.5)
    train(model, steps=3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        llama().to(dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True
    )
    assert all(torch.equal(deltas(loaded)[name], delta) for name, delta in deltas(model).items())
    assert torch.equal(logits(loaded), logits(model))
    loaded(**batch()).loss.backward()
    with_gradient = {
        layer.graddrop_block
        for n, layer in graddrop_layers(loaded).items()
        if layer.deltas("default").weight_delta.grad is not None
    }
    masks = masks_of(loaded)
    assert with_gradient == {block for block in masks.blocks if not masks.mask("", block).keeps_nothing}


def kept_storages(model, x):
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage, tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers(), x]}
    return y, {pointer: shape for pointer, (_, shape) in kept.items() if pointer not in own}


@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv1d", "conv", "conv, groups"])
def test_sum_of_weight_and_delta_is_not_kept_for_the_backward_pass(kind):
    layer, model, x = made(kind)
    _, kept = kept_storages(model, x.requires_grad_())
    assert not [shape for shape in kept.values() if shape.numel() == layer.weight.numel()]


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_input_is_not_kept_where_nothing_of_the_weight_trains(kind):
    _, model, x = made(kind, granularity="layer", p=0.5)
    masks = masks_of(model)
    shares = {}
    for number in range(20):
        masks.set_step(number)
        own = x.clone().requires_grad_() * 1.0
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            model(own)
        trains = not masks.mask("", "layer").keeps_nothing
        shares.setdefault(trains, set()).add(any(t.shape[-1] == x.shape[-1] and t.numel() == x.numel() for t in kept))
    assert shares == {True: {True}, False: {False}}


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.__name__.split(".")[0] in ("mm", "addmm", "bmm", "convolution", "convolution_backward")
        return func(*args, **(kwargs or {}))


def test_masked_layers_compute_no_weight_gradient():
    model = dropped(tower(num_blocks=4), "Layer-GradDrop", p=0.5)
    masks = masks_of(model)
    counts = set()
    for number in range(24):
        masks.set_step(number)
        loss = loss_of(model)
        with Products() as products:
            loss.backward()
        training = [block for block in masks.blocks if not masks.mask("", block).keeps_nothing]
        for name, delta in deltas(model).items():
            assert (delta.grad is not None) == any(name.startswith(f"{block}.") for block in training)
            delta.grad = None
        lowest = masks.blocks.index(training[0]) if training else 0  # if nothing trains, gradients of zero reach all
        counts.add((len(training), lowest, products.count))
    assert len({lowest for _, lowest, _ in counts}) > 2
    # of each block two gradients of weights, if it trains, and two of inputs, if it or one below it does
    assert len({count - 2 * training - 2 * (4 - lowest) for training, lowest, count in counts}) == 1


def test_masked_layers_save_arithmetic():
    model = dropped(llama(), "GradFreeze-TopDown", num_epochs=3)
    graddrop = GradDrop(model)
    flops = []
    for epoch in range(3):
        graddrop.set_epoch(epoch)
        loss = model(**batch()).loss
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        flops.append(counter.get_total_flops())
    per_block = 2 * 8 * 12 * (4 * 32 * 32 + 3 * 32 * 64)
    # nothing below the last block that trains is computed: neither gradients of weights nor of inputs
    assert [flops[1] - flops[0], flops[2] - flops[1]] == [2 * per_block, 2 * per_block]


@pytest.mark.parametrize("frozen", ["hold", "gradient"])
def test_gradient_of_a_masked_layer_is_none_or_zero_as_frozen_says(frozen):
    model = dropped(tower(), "GradFreeze-TopDown", num_epochs=3, frozen=frozen)
    GradDrop(model).set_epoch(0)
    loss_of(model).backward()
    for name, delta in deltas(model).items():
        if name.startswith("layers.2."):
            assert delta.grad.any()
        else:
            assert delta.grad is None if frozen == "hold" else not delta.grad.any()


def test_no_gradient_mode_leaves_masks_alone():
    model = dropped(tower(), "GradDrop-Epoch", num_epochs=3)
    with torch.no_grad():
        assert loss_of(model).isfinite()


def test_deleted_model_is_freed():
    model = dropped(tower())
    optimizer = sgd(model)
    step(model, optimizer)
    dead = [weakref.ref(module) for module in model.modules()]
    del model, optimizer
    gc.collect()
    assert not any(reference() for reference in dead)


def test_layer_that_returns_a_view_can_be_changed_in_place():
    class InPlace(One):
        def forward(self, x):
            return self.layer(x).mul_(2.0)

    model = get_peft_model(InPlace(nn.Linear(6, 5)), GradDropConfig(target_modules=["layer"], p=0.0))
    model(torch.randn(2, 3, 6)).sum().backward()
    assert deltas(model)["layer.weight"].grad.any()


def test_normalisation_with_running_statistics_is_refused():
    with pytest.raises(TypeError, match="'1' is a BatchNorm2d"):
        get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), GradDropConfig(target_modules=["0", "1"]))


def test_representation_says_graddrop():
    model = dropped(tower())
    assert "graddrop.GradDropLinear(" in repr(model)


def test_conversion_to_lora_is_declined():
    assert not next(iter(graddrop_layers(dropped()).values())).supports_lora_conversion()
