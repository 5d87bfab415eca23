"""Which layers write their weight out, and that a model notices no difference."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from tiny import adapted, batch, llama, logits, train
from torch import nn
from versions import needs_one_graph

from peft_sparsegrad import SparseGradConfig, SparseGradLinear
from peft_sparsegrad.functional import writing_out_pays
from peft_sparsegrad.sparsegrad import layer as layer_module

MANY = torch.randn(200, 32)


@pytest.fixture
def written_out(monkeypatch):
    """How often a weight is written out; setting `allowed` to False takes the slow twin."""

    class Count:
        calls, allowed = 0, True

    def pays(*problem):
        decision = Count.allowed and writing_out_pays(*problem)
        Count.calls += decision
        return decision

    monkeypatch.setattr(layer_module, "writing_out_pays", pays)
    return Count


def one_layer(base=None, **settings):
    """The adapted layer of a model that has one."""
    model = nn.Sequential(base or nn.Linear(32, 48))
    config = {"density": 0.2, "warmup_steps": 0, "init_weights": False, **settings}
    return get_peft_model(model, SparseGradConfig(target_modules=["0"], **config))


@pytest.mark.parametrize(
    "settings", [{}, {"basis": "identity"}, {"rank": (16, 16)}, {"rank": "full"}, {"support": "dynamic"}], ids=str
)
@pytest.mark.parametrize("warmup_steps", [0, 4])
def test_a_training_is_the_same_either_way(written_out, settings, warmup_steps):
    """Float64, warm-up and renewals of the support included."""
    settings = {"renewal_steps": 3, "warmup_steps": warmup_steps, "density": 0.1, **settings}
    fast = adapted(llama().double(), **settings)
    losses = train(fast, steps=14)
    assert written_out.calls >= 3 * (14 - warmup_steps), "three or all of the six layers"
    written_out.allowed, written_out.calls = False, 0
    slow = adapted(llama().double(), **settings)
    assert losses == pytest.approx(train(slow, steps=14), abs=1e-9)
    torch.testing.assert_close(logits(fast), logits(slow), rtol=1e-8, atol=1e-8)
    assert not written_out.calls


def test_few_tokens_take_the_delta(written_out):
    model = one_layer()
    few, many = model(MANY[:4]), model(MANY)
    assert written_out.calls == 1
    torch.testing.assert_close(few, many[:4])


class Hooked(nn.Linear):
    """A subclass may do anything in its forward pass."""


def hooked(base: nn.Linear, register: str) -> nn.Linear:
    getattr(base, register)(lambda *args: None)
    return base


def wrapped(base: nn.Linear) -> nn.Linear:
    forward = base.forward
    base.forward = lambda x: forward(x)  # what accelerate does to move weights
    return base


@pytest.mark.parametrize(
    "base",
    [
        Hooked(32, 48),
        wrapped(nn.Linear(32, 48)),
        nn.Linear(32, 48).bfloat16(),
        *(
            hooked(nn.Linear(32, 48), f"register_{kind}")
            for kind in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
        ),
    ],
)
def test_only_a_plain_linear_layer_is_written_out(written_out, base):
    x = MANY.to(base.weight.dtype)
    model = one_layer(base)
    output = model(x)
    assert not written_out.calls
    layer = model.base_model.model[0]
    expected = x @ (base.weight + layer.get_delta_weight("default").to(x)).T + base.bias
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)


def test_autocast_and_trained_bases_take_the_delta(written_out):
    model = one_layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(MANY)
    base_layer = model.base_model.model[0].base_layer
    base_layer.bias.requires_grad_(True)
    model(MANY).sum().backward()
    assert not written_out.calls
    assert torch.equal(base_layer.bias.grad, torch.full((48,), 200.0))


def test_a_float64_layer_keeps_its_precision_under_autocast_which_leaves_it_alone():
    model = one_layer(nn.Linear(32, 48).double(), basis="svd").double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(MANY.double())
    torch.testing.assert_close(found, model(MANY.double()), rtol=1e-12, atol=1e-12)


def test_global_hooks_see_the_frozen_layer(written_out):
    """Profilers use them."""
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        one_layer()(MANY)
    finally:
        handle.remove()
    assert nn.Linear in seen
    assert not written_out.calls


def test_two_active_disabled_and_merged_adapters_take_the_delta(written_out):
    model = one_layer()
    config = SparseGradConfig(target_modules=["0"], density=0.1, warmup_steps=0, init_weights=False)
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    layer = model.base_model.model[0]
    deltas = [layer.get_delta_weight(name) for name in ("default", "second")]
    both = MANY @ (layer.weight + sum(deltas)).T + layer.base_layer.bias
    torch.testing.assert_close(model(MANY), both)
    with model.disable_adapter():
        torch.testing.assert_close(model(MANY), MANY @ layer.weight.T + layer.base_layer.bias)
    model.merge_adapter()
    torch.testing.assert_close(model(MANY), both, rtol=1e-5, atol=1e-5)
    assert not written_out.calls
    model.unmerge_adapter()
    model.set_adapter("second")
    torch.testing.assert_close(model(MANY), MANY @ (layer.weight + deltas[1]).T + layer.base_layer.bias)
    assert written_out.calls == 1


def test_the_warm_up_and_probes_see_the_gradients(written_out):
    model = one_layer(warmup_steps=4, init_weights=True)
    for _ in range(4):
        model(MANY).square().sum().backward()
    assert not written_out.calls
    layer, seen = model.base_model.model[0], []
    layer.adapter("default").probe = lambda layer, gradient: seen.append(gradient.x.shape) or True
    model(MANY).square().sum().backward()
    assert seen == [MANY.shape]
    assert not written_out.calls
    with torch.no_grad():
        model(MANY)
    assert written_out.calls == 1


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(written_out, use_reentrant):
    plain = train(adapted().train(), steps=5)
    model = adapted().train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    written_out.calls = 0
    assert train(model, steps=5) == pytest.approx(plain, abs=1e-5)
    assert written_out.calls == 2 * 5 * 6, "once in the forward pass, once when it is repeated"


@needs_one_graph
@pytest.mark.parametrize("tokens", [5, 200])
def test_compiled_layer_agrees(tokens):
    model, x = one_layer(), MANY[:tokens]
    model(x).square().sum().backward()
    (values,) = [p for p in model.parameters() if p.requires_grad]
    expected, values.grad = values.grad, None
    torch.compile(model, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    torch.testing.assert_close(values.grad, expected, rtol=1e-4, atol=1e-4)


def test_evaluation_and_generation_in_half_precision_are_untouched(written_out):
    model = adapted(llama().bfloat16(), init_weights=False)
    model.eval()
    with torch.no_grad():
        model(**batch())
    assert not written_out.calls
    assert all(type(m.base_layer) is nn.Linear for m in model.modules() if isinstance(m, SparseGradLinear))
