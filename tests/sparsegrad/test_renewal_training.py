"""Renewals with checkpointing, autocast, bfloat16, a gradient scaler and torch.compile."""

import pytest
import torch
from renewal_tools import adamw, counted, data, layers, mlp, run_of, supports, trained_parameters
from tiny import adapted, batch, llama
from versions import needs_one_graph


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_renews_the_same(use_reentrant):
    plain, model = adapted(renewal_steps=3).train(), adapted(renewal_steps=3).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert run_of(model) == pytest.approx(run_of(plain), abs=1e-5)
    assert supports(model) == supports(plain) != supports(adapted())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = adapted(renewal_steps=3)
    optimizer, losses = adamw(model), []
    for number in range(14):
        with torch.autocast("cpu", dtype=dtype):
            loss = model(**batch(number % 4)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert {layer.adapter("default").gradient_sum.dtype for layer in layers(model)} == {torch.float32}
    assert supports(model) != supports(adapted())
    assert losses[-4:] < losses[:4]


def test_model_in_bfloat16_sums_in_float32():
    model = adapted(renewal_steps=4).to(torch.bfloat16)
    run_of(model, steps=3)
    for layer in layers(model):
        gradient_sum = layer.adapter("default").gradient_sum
        assert gradient_sum.dtype == torch.float32
        assert gradient_sum.any()
    run_of(model, steps=3)
    assert supports(model) != supports(adapted())


def test_step_that_a_gradient_scaler_skips_is_not_counted():
    model = adapted(renewal_steps=3)
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=2.0**60), adamw(model)
    taken = 0
    for number in range(60):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(**batch(number % 4)).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        overflow = any(not torch.isfinite(p.grad).all() for p in trained_parameters(model))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        taken += not overflow
        assert counted(model) == {taken}
        if taken == 4:
            break
    assert number > 10, "the first scales must overflow"
    assert supports(model) != supports(adapted())
    for layer in layers(model):
        assert torch.isfinite(layer.adapter("default").gradient_sum).all()


def test_sum_is_no_buffer_so_that_ddp_does_not_overwrite_it():
    model = adapted()
    run_of(model, 2)
    sums = [layer.adapter("default").gradient_sum for layer in layers(model)]
    assert all(each.any() for each in sums)
    assert not [name for name, buffer in model.named_buffers() if any(buffer is each for each in sums)]


@pytest.mark.slow  # `test_compiled_model_warms_up_and_trains` renews a compiled model too
def test_compiled_model_renews_the_same():
    plain, model = (adapted(llama(num_hidden_layers=1), renewal_steps=2) for _ in range(2))
    before = supports(model)
    assert run_of(torch.compile(model, backend="aot_eager"), 5) == pytest.approx(run_of(plain, 5), abs=1e-4)
    assert supports(model) == supports(plain) != before


@needs_one_graph
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compiled_without_graph_breaks(dtype):
    torch.compiler.reset()
    plain, model = mlp(), mlp()
    model(data(0)[0])  # unpacks the supports
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    losses = []
    for made, called in ((plain, plain), (model, compiled)):
        optimizer = adamw(made, 0.05)
        losses.append([])
        for number in range(12):
            x, target = data(number)
            with torch.autocast("cpu", dtype=torch.float16, enabled=dtype is torch.float16):
                loss = (called(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], abs=1e-3 if dtype is torch.float16 else 1e-9)
    assert supports(model) != supports(mlp())
    if dtype is torch.float32:
        assert supports(model) == supports(plain)
