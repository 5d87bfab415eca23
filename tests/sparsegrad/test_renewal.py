"""Growing back: a support follows the gradient while it trains, and the optimizer's state follows the support."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import math

import pytest
import torch
from fresh import run_program
from paper_layer import random_orthogonal
from peft import PeftModel, get_peft_model
from tiny import adapted, batch, llama, logits, rows, train
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from versions import needs_one_graph

from peft_sparsegrad import SparseGradConfig, SparseGradLinear, create_sparsegrad_optimizer, warmup
from peft_sparsegrad.common.optimizer_watcher import observers
from peft_sparsegrad.common.pieces import piece_of
from peft_sparsegrad.sparsegrad.renewal import next_renewal, reset_state

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def layers(model) -> list[SparseGradLinear]:
    return [module for module in model.modules() if isinstance(module, SparseGradLinear)]


def supports(model, name: str = "default") -> list[list[int]]:
    return [layer.adapter(name).indices.tolist() for layer in layers(model)]


def counted(model, name: str = "default") -> set[int]:
    return {layer.adapter(name).num_steps for layer in layers(model)}


def trained_parameters(model) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(model, lr: float = 0.02, **settings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained_parameters(model), lr=lr, **settings)


def step(model, optimizer, number: int = 0) -> float:
    loss = model(**batch(number % 4)).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


# The slow twin: dense cores, dictionaries for supports and moments, Adam and the renewal entry by entry. -------------

SIZES, K, FIRST, BETAS, EPS = [6, 10, 10, 3], 12, 5, (0.9, 0.999), 1e-8


class Twin:
    """Layers y = W x + b + V S Uᵀ x with tanh between them, whose dense cores S train where their supports are."""

    def __init__(self, model, lr: float, weight_decay: float) -> None:
        self.lr, self.weight_decay, self.steps = lr, weight_decay, 0
        self.linears, self.bases, self.cores, self.values, self.m, self.v, self.sums = [], [], [], [], [], [], []
        for layer in layers(model):
            adapter = layer.adapter("default")
            plan, values, group = adapter.plan, adapter.values, adapter.basis
            n_out, n_in = plan.weight_shape
            U = torch.eye(n_in, dtype=torch.float64) if group.U is None else group.U
            V = torch.eye(n_out, dtype=torch.float64) if group.V is None else group.V
            self.linears.append(copy.deepcopy(layer.base_layer))
            self.bases.append((U.clone(), V.clone()))
            self.values.append(dict(zip(adapter.indices.tolist(), values.tolist(), strict=True)))
            self.m.append(dict.fromkeys(self.values[-1], 0.0))
            self.v.append(dict.fromkeys(self.values[-1], 0.0))
            self.sums.append([0.0] * plan.num_entries)

    def loss(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.cores = []
        for i, (linear, (U, V)) in enumerate(zip(self.linears, self.bases, strict=True)):
            core = torch.zeros(V.shape[1] * U.shape[1], dtype=torch.float64)
            for index, value in self.values[i].items():
                core[index] = value
            self.cores.append(core.view(V.shape[1], U.shape[1]).requires_grad_())
            x = linear(x if i == 0 else torch.tanh(x)) + (x if i == 0 else torch.tanh(x)) @ U @ self.cores[i].T @ V.T
        return (x - target).square().mean()

    def train(self, x: torch.Tensor, target: torch.Tensor) -> float:
        loss = self.loss(x, target)
        gradients = torch.autograd.grad(loss, self.cores)
        self.steps += 1
        for i, gradient in enumerate(gradient.flatten().tolist() for gradient in gradients):
            self.sums[i] = [a + b for a, b in zip(self.sums[i], gradient, strict=True)]
            for index in self.values[i]:
                self._adam(i, index, gradient[index])
            if self.steps in (5, 10, 20, 40):
                self._renew(i)
        return loss.item()

    def _adam(self, i: int, index: int, g: float) -> None:
        m = self.m[i][index] = BETAS[0] * self.m[i][index] + (1 - BETAS[0]) * g
        v = self.v[i][index] = BETAS[1] * self.v[i][index] + (1 - BETAS[1]) * g * g
        m_hat, v_hat = m / (1 - BETAS[0] ** self.steps), v / (1 - BETAS[1] ** self.steps)
        decayed = self.values[i][index] * (1 - self.lr * self.weight_decay)
        self.values[i][index] = decayed - self.lr * m_hat / (math.sqrt(v_hat) + EPS)

    def _renew(self, i: int) -> None:
        """30% of 12 values, rounded down, are 3."""
        values = self.values[i]
        survivors = sorted(values, key=lambda index: abs(values[index]))[3:]
        free = [index for index in range(len(self.sums[i])) if index not in survivors]
        new = [*survivors, *sorted(free, key=lambda index: -abs(self.sums[i][index]))[:3]]
        fills = [0.0]
        for moments in (self.m[i], self.v[i]):
            nowhere_negative = all(moment >= 0 for moment in moments.values())
            fills.append(sum(moments.values()) / len(moments) if nowhere_negative else 0.0)
        old = (values, self.m[i], self.v[i])
        # an entry that was dropped and is chosen again has not been away
        moved = [{index: at.get(index, fill) for index in sorted(new)} for at, fill in zip(old, fills, strict=True)]
        self.values[i], self.m[i], self.v[i] = moved
        self.sums[i] = [0.0] * len(self.sums[i])


def mlp(**settings):
    """A PEFT model in float64 with fixed random bases; one-sided on (10, 6), (10, 10) and (3, 10) by default."""
    torch.manual_seed(0)
    modules = [module for i, o in itertools.pairwise(SIZES) for module in (nn.Linear(i, o), nn.Tanh())][:-1]
    defaults = {"num_values": K, "slack": 3, "warmup_steps": 0, "renewal_steps": FIRST}
    config = SparseGradConfig(target_modules=["0", "2", "4"], **{**defaults, **settings})
    model = get_peft_model(nn.Sequential(*modules).double(), config).double()
    for layer in layers(model):
        group = layer.adapter("default").basis
        n_out, n_in = group.weight_shape
        U = None if group.U is None else random_orthogonal(n_in, seed=1)[:, : group.U.shape[1]]
        V = None if group.V is None else random_orthogonal(n_out, seed=2)[:, : group.V.shape[1]]
        group.fill(U, V)
    return model


def data(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number % 7)
    x = torch.randn(9, SIZES[0], dtype=torch.float64, generator=generator)
    return x, torch.randn(9, SIZES[-1], dtype=torch.float64, generator=generator)


def mlp_step(model, optimizer, number: int) -> float:
    x, target = data(number)
    loss = (model(x) - target).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("settings", [{}, {"rank": "full"}, {"rank": (None, 5)}, {"init_weights": False}], ids=str)
def test_training_is_the_slow_twins(settings, weight_decay):
    model = mlp(**settings)
    twin, optimizer = Twin(model, 0.05, weight_decay), adamw(model, 0.05, weight_decay=weight_decay)
    renewals, before = [], supports(model)
    for number in range(60):
        assert mlp_step(model, optimizer, number) == pytest.approx(twin.train(*data(number)), rel=1e-9)
        for layer, values, m, v in zip(layers(model), twin.values, twin.m, twin.v, strict=True):
            adapter = layer.adapter("default")
            parameter = adapter.values
            assert sorted(adapter.indices.tolist()) == list(values)
            for ours, theirs in (
                (parameter, values),
                (optimizer.state[parameter]["exp_avg"], m),
                (optimizer.state[parameter]["exp_avg_sq"], v),
            ):
                expected = torch.tensor([theirs[index] for index in adapter.indices.tolist()], dtype=torch.float64)
                torch.testing.assert_close(ours.detach(), expected, **EXACT)
        if supports(model) != before:
            renewals.append(number + 1)
        before = supports(model)
        summed = {layer.adapter("default").gradient_sum is not None for layer in layers(model)}
        assert summed == {number + 1 not in (5, 10, 20, 40)}, "every layer is renewed, and only then"
    assert renewals == [5, 10, 20, 40]


@pytest.mark.parametrize("first", [1, 2, 3, 25])
def test_renewals_come_when_the_number_of_steps_has_doubled(first):
    due = [steps for steps in range(1, 500) if next_renewal(steps - 1, first) == steps]
    assert due == [first * 2**i for i in range(12) if first * 2**i < 500]


def test_no_renewal_where_none_was_asked_for():
    model = adapted(renewal_steps=0)
    before = supports(model)
    train(model, steps=30)
    assert supports(model) == before
    assert all(layer.adapter("default").gradient_sum is None for layer in layers(model))


def test_default_renews_at_the_25th_step():
    model = adapted()
    before, optimizer = supports(model), adamw(model)
    for number in range(24):
        step(model, optimizer, number)
    assert supports(model) == before
    step(model, optimizer)
    assert supports(model) != before


def test_dynamic_supports_have_no_sum():
    assert {layer.adapter("default").gradient_sum for layer in layers(adapted(support="dynamic"))} == {None}


def test_steps_are_counted_from_the_end_of_the_warm_up():
    """The step that ends the warm-up has moved nothing, and is not one of them."""
    model = adapted(warmup_steps=4, renewal_steps=3)
    optimizer = adamw(model)
    for number in range(3):
        step(model, optimizer, number)
    assert counted(model) == {-1}
    step(model, optimizer)
    assert counted(model) == {0}
    assert {layer.adapter("default").gradient_sum for layer in layers(model)} == {None}
    chosen = supports(model)
    step(model, optimizer)
    step(model, optimizer)
    assert supports(model) == chosen
    step(model, optimizer)
    assert supports(model) != chosen


# Optimizers ----------------------------------------------------------------------------------------------------------


def test_sparsegrads_own_optimizer():
    model = adapted(renewal_steps=3)
    optimizer = create_sparsegrad_optimizer(model, lr=0.02)
    before = supports(model)
    losses = [step(model, optimizer, number) for number in range(20)]
    assert supports(model) != before
    assert losses[-4:] < losses[:4]


def fake_optimizer(values: torch.Tensor, **state) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD([values], lr=0.1)
    optimizer.state[values] = state
    return optimizer


RENEWED = torch.tensor([False, True, False, True])


def test_scales_begin_with_their_mean_and_all_else_with_zero():
    values = nn.Parameter(torch.zeros(4))
    optimizer = fake_optimizer(
        values,
        scale=torch.tensor([1.0, 2.0, 0.0, 9.0]),
        momentum=torch.tensor([1.0, -2.0, 3.0, 4.0]),
        negative=torch.tensor([-1.0, -2.0, -3.0, -4.0]),
        half=torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.bfloat16),
        step=torch.tensor(7.0),
        several=torch.tensor([[1.0, -2.0, 3.0, 4.0], [0.0, 1.0, 1.0, 2.0]]),
        number=3,
        nothing=None,
    )
    state = optimizer.state[values]
    scale = state["scale"]
    reset_state(optimizer, piece_of(values), RENEWED)
    assert state["scale"] is scale, "in place, for whoever else holds it"
    assert {key: s.tolist() if isinstance(s, torch.Tensor) else s for key, s in state.items()} == {
        "scale": [1, 3, 0, 3],
        "momentum": [1, 0, 3, 0],
        "negative": [-1, 0, -3, 0],
        "half": [1, 3, 3, 3],
        "step": 7,
        "several": [[1, 0, 3, 0], [0, 0, 1, 0]],
        "number": 3,
        "nothing": None,
    }


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64])
def test_state_in_blocks_begins_anew(dtype):
    values, other = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    optimizer = fake_optimizer(values, state1=torch.ones(4, dtype=dtype), scale=torch.ones(4), absmax1=torch.ones(1))
    optimizer.state[other] = {"scale": torch.ones(4)}
    reset_state(optimizer, piece_of(values), RENEWED)
    assert values not in optimizer.state
    assert optimizer.state[other] == {"scale": optimizer.state[other]["scale"]}
    reset_state(optimizer, piece_of(values), RENEWED)
    assert values not in optimizer.state, "an optimizer without state has nothing to move, and gets none"


def test_optimizer_that_does_not_hold_the_values():
    model = adapted(renewal_steps=2, modules_to_save=["lm_head"])
    head = [p for n, p in model.named_parameters() if p.requires_grad and "lm_head" in n]
    before, optimizer = supports(model), torch.optim.AdamW(head, lr=0.01)
    for number in range(5):
        step(model, optimizer, number)
    assert supports(model) == before
    assert counted(model) == {0}


def test_two_optimizers_count_once_each_for_what_they_hold():
    model = adapted(renewal_steps=4, modules_to_save=["lm_head"])
    values = [p for n, p in model.named_parameters() if "sparsegrad_adapter" in n]
    head = [p for n, p in model.named_parameters() if p.requires_grad and "lm_head" in n]
    optimizers = [torch.optim.AdamW(values[:2]), torch.optim.AdamW(values[2:]), torch.optim.AdamW(head)]
    model(**batch()).loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    assert counted(model) == {1}


class Nested(torch.optim.SGD):
    """An optimizer whose step calls its base class's, for which torch's hook runs once more."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_step_within_a_step_counts_once(set_to_none):
    model = adapted(warmup_steps=0, renewal_steps=3)
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1).step()  # the base class is hooked when it is first made
    optimizer = Nested(trained_parameters(model), lr=0.1)
    for number in range(4):
        model(**batch(number)).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    assert counted(model) == {4}


def test_values_without_a_step_size_keep_their_places_only_if_they_are_large():
    """With a learning rate of 0 the values stay what they are, and the smallest still give way to zeros."""
    model = adapted(renewal_steps=3, init_weights=False)
    values = [layer.adapter("default").values.tolist() for layer in layers(model)]
    before = list(zip(values, supports(model), strict=True))
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=0.0)
    for number in range(3):
        step(model, optimizer, number)
    for layer, (values, old), new in zip(layers(model), before, supports(model), strict=True):
        at = dict(zip(old, values, strict=True))
        assert new != old
        assert layer.adapter("default").values.tolist() == [at.get(index, 0.0) for index in new]


def test_survivors_keep_their_slots():
    model = adapted(renewal_steps=3)
    before = supports(model)
    run_of(model, steps=3)
    for old, new in zip(before, supports(model), strict=True):
        kept = set(old) & set(new)
        assert len(kept) < len(old)
        assert all(new[slot] == index for slot, index in enumerate(old) if index in kept)


def test_values_that_an_unknown_engine_has_cut_are_refused():
    model = adapted(renewal_steps=2)
    optimizer = torch.optim.SGD(trained_parameters(model), lr=0.1)
    for parameter in trained_parameters(model):
        parameter.data = parameter.data[:10]
        parameter.grad = torch.zeros(10)
    with pytest.raises(RuntimeError, match=r"10 of the 102 values of .*0\.mlp\.up_proj'.* set `renewal_steps=0`"):
        optimizer.step()


# Ways of training ----------------------------------------------------------------------------------------------------


def test_accumulation_counts_steps_and_sums_passes():
    model, single = adapted(renewal_steps=3), adapted(renewal_steps=3)
    optimizers = [torch.optim.SGD(trained_parameters(m), lr=0.5) for m in (model, single)]
    for number in range(4):
        for half in (slice(0, 4), slice(4, 8)):
            part = {"input_ids": batch(number)["input_ids"][half]}
            (model(**part, labels=part["input_ids"]).loss / 2).backward()
        ids = batch(number)["input_ids"]
        single(input_ids=ids, labels=ids).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if number == 1:
            sums = [[layer.adapter("default").gradient_sum for layer in layers(m)] for m in (model, single)]
            for ours, whole in zip(*sums, strict=True):
                torch.testing.assert_close(ours, whole, atol=1e-6, rtol=1e-3)
                assert ours.any()
    assert counted(model) == counted(single) == {4}
    assert supports(model) == supports(single)


def run_of(model, steps: int = 9, **settings):
    optimizer = adamw(model, **settings)
    return [step(model, optimizer, number) for number in range(steps)]


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


def test_frozen_adapter_is_left_alone_though_its_values_are_in_the_optimizer():
    model = adapted(renewal_steps=2, init_weights=False)
    model.add_adapter("other", SparseGradConfig(density=0.05, warmup_steps=0, renewal_steps=2, init_weights=False))
    before = [layer.adapter("other").values.detach().clone() for layer in layers(model)]
    old, own = supports(model, "other"), supports(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for number in range(5):
        step(model, optimizer, number)
    assert supports(model, "other") == old
    assert supports(model) != own
    assert (counted(model), counted(model, "other")) == ({5}, {0})
    for layer, values in zip(layers(model), before, strict=True):
        assert torch.equal(layer.adapter("other").values, values)
        assert layer.adapter("other").gradient_sum is None


def test_two_adapters_that_train_together_are_both_renewed():
    model = adapted(renewal_steps=2)
    model.add_adapter("other", SparseGradConfig(density=0.1, warmup_steps=0, renewal_steps=3))
    model.base_model.set_adapter(["default", "other"])
    own, other = supports(model), supports(model, "other")
    optimizer = adamw(model)
    step(model, optimizer, 0)
    step(model, optimizer, 1)
    assert supports(model) != own
    assert supports(model, "other") == other
    step(model, optimizer, 2)
    assert supports(model, "other") != other


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copy_renews_by_itself(how):
    model = adapted(renewal_steps=4)
    run_of(model, steps=2)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    before = supports(model)
    run_of(twin, steps=2)
    assert (counted(twin), counted(model)) == ({4}, {2})
    assert supports(model) == before != supports(twin)
    run_of(model, steps=2)
    assert supports(model) == supports(twin)


def test_models_are_not_kept_alive():
    gc.collect()  # the models of other tests
    before = len(observers())
    model = adapted()
    assert len(observers()) == before + 6 + 2  # each layer's, and those of the first gradients and of small steps
    del model
    gc.collect()
    assert len(observers()) <= before


def test_adapters_are_taken_in_the_same_order_on_every_rank():
    """In the model's, also in a copy; a set's order depends on the addresses of its elements."""
    model = adapted()
    twin = copy.deepcopy(model)
    for made in (model, twin):
        own = [layer.adapter("default").training_state for layer in layers(made)]
        assert [id(each) for each in observers() if any(each is one for one in own)] == [id(each) for each in own]


def test_sum_is_no_buffer_so_that_ddp_does_not_overwrite_it():
    model = adapted()
    assert not [name for name, _ in model.named_buffers() if "gradient_sum" in name]


# Compiled ------------------------------------------------------------------------------------------------------------


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


# Files ---------------------------------------------------------------------------------------------------------------


def test_steps_survive_save_and_load_in_a_fresh_process(tmp_path):
    model = adapted(renewal_steps=4)
    run_of(model, steps=6)  # the next renewal is at 8
    model.save_pretrained(tmp_path)
    code = """
import sys, torch, peft_sparsegrad
from peft import PeftModel
from tiny import llama, train
from peft_sparsegrad import SparseGradLinear
model = PeftModel.from_pretrained(llama(), sys.argv[1], is_trainable=True)
layers = [module for module in model.modules() if isinstance(module, SparseGradLinear)]
supports = lambda: [layer.adapter("default").indices.tolist() for layer in layers]
assert {layer.adapter("default").num_steps for layer in layers} == {6}
before = supports()
train(model, steps=1)
assert supports() == before
train(model, steps=1)
assert supports() != before
after = supports()
train(model, steps=7)
assert supports() == after
train(model, steps=1)
assert supports() != after
"""
    done = run_program("-c", code, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("how", ["from_pretrained", "load_adapter"])
def test_loaded_adapter_trains_on(tmp_path, how, low_cpu_mem_usage):
    model = adapted(renewal_steps=4)
    run_of(model, steps=5)
    model.save_pretrained(tmp_path)
    settings = {"is_trainable": True, "low_cpu_mem_usage": low_cpu_mem_usage}
    if how == "from_pretrained":
        loaded, name = PeftModel.from_pretrained(llama(), tmp_path, **settings), "default"
    else:
        loaded, name = adapted(), "other"
        loaded.load_adapter(tmp_path, adapter_name=name, **settings)
        loaded.set_adapter(name)
    for layer in layers(loaded):
        assert layer.adapter(name).gradient_sum is None
    before = supports(loaded, name)
    assert [sorted(each) for each in supports(model)] == before
    run_of(loaded, steps=3)
    assert counted(loaded, name) == {8}
    assert supports(loaded, name) != before


def test_loading_into_an_adapter_in_training_forgets_the_sum(tmp_path):
    model = adapted(renewal_steps=9)
    model.save_pretrained(tmp_path)
    run_of(model, steps=2)
    model.load_adapter(tmp_path, adapter_name="default", is_trainable=True)
    assert counted(model) == {0}
    assert {layer.adapter("default").gradient_sum for layer in layers(model)} == {None}


def test_adapter_for_inference_has_no_sum(tmp_path):
    model = adapted(renewal_steps=2)
    run_of(model, steps=3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert {layer.adapter("default").gradient_sum for layer in layers(loaded)} == {None}
    assert torch.equal(logits(loaded), logits(model))


def test_merged_after_renewals():
    model = adapted(renewal_steps=2)
    run_of(model, steps=6, lr=0.1)
    expected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    run_of(model, steps=1)
    assert counted(model) == {7}


@pytest.mark.parametrize("saved_at", [6, 8])
def test_trainer_resumes_between_renewals(tmp_path, saved_at):
    """The adapter and the optimizer together hold everything, without a callback, also in another folder."""

    def run(path, resume=None):
        model = adapted(renewal_steps=4)
        arguments = TrainingArguments(
            str(path), max_steps=17, save_steps=saved_at, per_device_train_batch_size=4, learning_rate=0.02,
            report_to=[], disable_tqdm=True, use_cpu=True, seed=3,
        )  # fmt: skip
        seen = [(0, supports(model))]

        class Look(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                seen.append((state.global_step, supports(model)))

        Trainer(model, arguments, train_dataset=rows(64), callbacks=[Look()]).train(resume_from_checkpoint=resume)
        return model, [number for (_, old), (number, new) in itertools.pairwise(seen[1:]) if old != new]

    through, renewals = run(tmp_path / "through")
    assert renewals == [4, 8, 16]
    resumed, later = run(tmp_path / "other", resume=str(tmp_path / "through" / f"checkpoint-{saved_at}"))
    assert counted(resumed) == {17}
    assert later == ([8, 16] if saved_at == 6 else [16])
    assert supports(resumed) == supports(through)
    assert torch.equal(logits(resumed), logits(through))


def test_explicit_warm_up_begins_the_sum_after_it():
    model = adapted(warmup_steps=4, renewal_steps=2)
    warmup(model, [batch(number) for number in range(4)], progress=False)
    assert {layer.adapter("default").gradient_sum for layer in layers(model)} == {None}
    before = supports(model)
    run_of(model, steps=1)
    assert supports(model) == before
    run_of(model, steps=1)
    assert supports(model) != before
