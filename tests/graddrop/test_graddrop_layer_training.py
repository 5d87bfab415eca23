"""GradDrop's layers in bfloat16, under autocast, with checkpointing and torch.compile."""

import pytest
import torch
from graddrop_layer_tools import made
from graddrop_tools import adamw, deltas, dropped, loss_of, masks_of, sgd, step, tower
from peft import get_peft_model
from tiny import batch, bert, llama, train

from peft_sparsegrad import GradDropConfig


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
    assert masks_of(model).progress.step == masks_of(plain).progress.step == 3
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
    assert masks_of(model).progress.step == 3
    assert all(torch.allclose(deltas(model)[name], delta) for name, delta in deltas(plain).items())
    assert torch.allclose(loss_of(compiled), loss_of(plain))
