"""Renewals under every kind of optimizer: what is kept for a value that survives stays, wherever it is kept."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math

import bitsandbytes
import pytest
import pytorch_optimizer
import schedulefree
import torch
from peft import PeftModel
from tiny import adapted, batch, llama
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers.optimization import Adafactor
from versions import needs_8_bit_optimizers_on_a_cpu

from peft_sparsegrad.sparsegrad.layer import layer_adapters

FIRST = 3  # the first renewal; the second is at the sixth step
TORCH = ["Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "LBFGS"]
OTHERS = [
    *("SOAP", "AdEMAMix", "Shampoo", "ScalableShampoo", "Lion", "Prodigy", "DAdaptAdam", "Adan", "CAME", "AdaBelief"),
    *("Ranger", "LaProp", "StableAdamW", "GrokFastAdamW", "MARS"),
]
IN_8_BIT = ["AdamW8bit", "PagedAdamW8bit", "AdEMAMix8bit", "Lion8bit", "RMSprop8bit", "Adagrad8bit", "LAMB8bit"]
OPTIMIZERS = {
    **{name: lambda p, name=name: getattr(torch.optim, name)(p) for name in TORCH},
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.02, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.02, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.5),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
    "centered": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "transformers' Adafactor": lambda p: Adafactor(p),
    **{f"other {name}": lambda p, name=name: getattr(pytorch_optimizer, name)(p, lr=0.01) for name in OTHERS},
    "Lookahead": lambda p: pytorch_optimizer.Lookahead(torch.optim.AdamW(p, lr=0.02), k=2),
    "schedule-free": lambda p: in_training_mode(schedulefree.AdamWScheduleFree(p, lr=0.02)),
    "AdEMAMix in 32 bits": lambda p: bitsandbytes.optim.AdEMAMix(p, lr=0.01),
    **{n: lambda p, n=n: getattr(bitsandbytes.optim, n)(p, lr=0.01, min_8bit_size=64) for n in IN_8_BIT},
}
BITSANDBYTES = ["AdEMAMix in 32 bits", *IN_8_BIT]
DROPPED = {"LBFGS", "other Shampoo", "other ScalableShampoo", *IN_8_BIT}  # no state by value: it begins again


def marked(names):
    """The names as parameters of a test, with the mark of those that need it."""
    return [pytest.param(n, marks=needs_8_bit_optimizers_on_a_cpu) if n in BITSANDBYTES else n for n in names]


def in_training_mode(optimizer):
    optimizer.train()
    return optimizer


def made(name: str, **settings):
    """A model and its optimizer; a core of several hundred values, so that 8-bit states have several blocks."""
    torch.manual_seed(0)
    model = adapted(llama(num_hidden_layers=1), density=0.3, renewal_steps=FIRST, **settings).train()
    return model, OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])


def step(model, optimizer, number: int) -> float:
    def closure():
        optimizer.zero_grad()
        loss = model(**batch(number % 4)).loss
        loss.backward()
        return loss

    if isinstance(optimizer, torch.optim.LBFGS):
        return optimizer.step(closure).item()
    loss = closure()
    optimizer.step()
    return loss.item()


def state_of(optimizer, values) -> dict[str, torch.Tensor]:
    """The state of the values that has more than one number, also that of an optimizer inside."""
    inner = getattr(optimizer, "optimizer", None)
    states = {**optimizer.state.get(values, {}), **(inner.state.get(values, {}) if inner is not None else {})}
    return {key: state for key, state in states.items() if isinstance(state, torch.Tensor) and state.numel() > 1}


@pytest.mark.parametrize("renewal", [pytest.param(FIRST, marks=pytest.mark.slow), 2 * FIRST])
@pytest.mark.parametrize("name", marked(OPTIMIZERS))
def test_survivors_keep_what_they_have(name, renewal):
    """Beside a twin that is the same up to this step, and is not renewed in it."""
    (model, optimizer), (twin, other) = made(name), made(name)
    for number in range(renewal):
        if number == renewal - 1:
            for adapter in layer_adapters(twin, "default"):
                adapter.plan = dataclasses.replace(adapter.plan, renewal_steps=0)
        assert step(model, optimizer, number) == step(twin, other, number)
    for ours, theirs in zip(layer_adapters(model, "default"), layer_adapters(twin, "default"), strict=True):
        renewed = ours.indices != theirs.indices
        assert 0 < renewed.sum() <= int(0.3 * ours.plan.k)
        assert torch.equal(ours.values[~renewed], theirs.values[~renewed])
        assert not ours.values[renewed].any()
        if name in DROPPED:
            assert ours.values not in optimizer.state
            continue
        before, after = state_of(other, theirs.values), state_of(optimizer, ours.values)
        assert before.keys() == after.keys()
        for key, state in after.items():
            fill = before[key].mean() if (before[key] >= 0).all() else torch.zeros(())
            assert torch.equal(state[..., ~renewed], before[key][..., ~renewed]), key
            torch.testing.assert_close(state[..., renewed], fill.expand_as(state[..., renewed]))
    losses = [step(model, optimizer, number) for number in range(renewal, renewal + 8)]
    assert all(map(math.isfinite, losses))


@pytest.mark.parametrize(
    "name", marked(["AdamW", "Lookahead", "schedule-free", "other SOAP", "AdEMAMix in 32 bits", "AdamW8bit"])
)
def test_resumed_from_adapter_and_optimizer(name, tmp_path):
    """Bit for bit, in the middle between two renewals."""
    model, optimizer = made(name)
    for number in range(5):
        step(model, optimizer, number)
    model.save_pretrained(tmp_path)
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = PeftModel.from_pretrained(llama(num_hidden_layers=1), tmp_path, is_trainable=True).train()
    again = OPTIMIZERS[name]([p for p in resumed.parameters() if p.requires_grad])
    again.load_state_dict(saved)
    for number in range(5, 14):
        assert step(resumed, again, number) == step(model, optimizer, number)
    for ours, theirs in zip(layer_adapters(resumed, "default"), layer_adapters(model, "default"), strict=True):
        assert torch.equal(ours.indices, theirs.indices)
        assert torch.equal(ours.values, theirs.values)


def test_optimizer_saved_before_its_first_step_after_resuming_carries_on(tmp_path):
    model, optimizer = made("AdamW")
    for number in range(5):
        step(model, optimizer, number)
    model.save_pretrained(tmp_path)
    between = OPTIMIZERS["AdamW"]([torch.nn.Parameter(p.detach()) for p in model.parameters() if p.requires_grad])
    between.load_state_dict(optimizer.state_dict())
    resumed = PeftModel.from_pretrained(llama(num_hidden_layers=1), tmp_path, is_trainable=True).train()
    again = OPTIMIZERS["AdamW"]([p for p in resumed.parameters() if p.requires_grad])
    again.load_state_dict(copy.deepcopy(between.state_dict()))
    for number in range(5, 8):
        assert step(resumed, again, number) == step(model, optimizer, number)


def test_sums_of_one_rank_of_several_are_not_taken_for_all_in_silence(tmp_path):
    model, optimizer = made("AdamW")
    for number in range(5):
        step(model, optimizer, number)
    model.save_pretrained(tmp_path)
    saved = copy.deepcopy(optimizer.state_dict())
    for layer in saved["param_groups"][0]["sparsegrad"].values():
        layer["share"] = torch.tensor([2, 0])
    resumed = PeftModel.from_pretrained(llama(num_hidden_layers=1), tmp_path, is_trainable=True).train()
    again = OPTIMIZERS["AdamW"]([p for p in resumed.parameters() if p.requires_grad])
    again.load_state_dict(saved)
    with pytest.warns(UserWarning, match="written by one of 2 ranks"):
        step(resumed, again, 5)


def test_new_optimizer_for_a_loaded_adapter_needs_no_order(tmp_path):
    model, optimizer = made("AdamW")
    for number in range(5):
        step(model, optimizer, number)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(num_hidden_layers=1), tmp_path, is_trainable=True).train()
    fresh = OPTIMIZERS["Adagrad"]([p for p in loaded.parameters() if p.requires_grad])  # has a state from the start
    losses = [step(loaded, fresh, number) for number in range(12)]
    assert losses[-1] < losses[-5]


class SlowWeights:
    """A wrapper of an optimizer that is none of torch's, and goes back half of the way at every fourth step."""

    def __init__(self, optimizer) -> None:
        self.optimizer, self.count = optimizer, itertools.count(1)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.slow = [p.detach().clone() for p in self.parameters]

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        if next(self.count) % 4 == 0:
            for parameter, slow in zip(self.parameters, self.slow, strict=True):
                slow.lerp_(parameter, 0.5)
                parameter.copy_(slow)


def test_slow_weights_that_nobody_announces_are_refused_where_they_would_be_wrong():
    torch.manual_seed(0)
    model = adapted(renewal_steps=8).train()
    optimizer = SlowWeights(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02))
    for number in range(8):
        step(model, optimizer, number)
    with pytest.raises(RuntimeError, match=r"written earlier values over the new ones.*`renewal_steps=0`"):
        step(model, optimizer, 8)


def delta_of(model) -> list[torch.Tensor]:
    layers = [module for module in model.modules() if hasattr(module, "sparsegrad_adapter")]
    return [layer.get_delta_weight("default").clone() for layer in layers]


def test_average_of_the_values_is_the_average_of_the_deltas_up_to_what_was_dropped():
    """An average by slots has no place for a dropped value, which the average of deltas forgets by halves."""
    torch.manual_seed(0)
    model = adapted(renewal_steps=4).train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    expected, errors = None, []
    for number in range(8):
        step(model, optimizer, number)
        average.update_parameters(model)
        now = delta_of(model)
        expected = now if expected is None else [(a + b) / 2 for a, b in zip(expected, now, strict=True)]
        pairs = list(zip(delta_of(average.module), expected, strict=True))
        error = sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)
        errors.append(error.sqrt().item())
    assert max(errors[:3]) < 1e-5
    assert errors[3] < 0.2, "in the step of the renewal"
    assert errors[6] < errors[3] / 4
