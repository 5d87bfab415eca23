"""`SparseGradAdam` against the paper's masked Adam, and as an optimizer among others."""

from __future__ import annotations

import copy

import pytest
import torch
from paper_layer import PaperAdam
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_sparsegrad import SparseGradAdam, SparseGradConfig, create_sparsegrad_optimizer

SHAPES = [(40,), (5, 8), (1,)]


def parameters(dtype=torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(*s, dtype=torch.float64, generator=generator).to(dtype)) for s in SHAPES]


def set_gradients(*models: list[nn.Parameter], step: int, share: float = 0.3) -> None:
    """The same random gradients for all, each entry non-zero with probability `share`."""
    generator = torch.Generator().manual_seed(100 + step)
    for same in zip(*models, strict=True):
        gradient = torch.randn(same[0].shape, dtype=torch.float64, generator=generator)
        gradient[torch.rand(same[0].shape, generator=generator) >= share] = 0
        for parameter in same:
            parameter.grad = gradient.to(parameter.dtype, copy=True)


def run(optimizer, params, steps, **options) -> None:
    for step in steps:
        set_gradients(params, step=step, **options)
        optimizer.step()


def assert_equal(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "settings",
    [{}, {"weight_decay": 0.1}, {"betas": (0.5, 0.7), "eps": 1e-3}, {"lr": 0.3, "betas": (0.0, 0.0)}],
    ids=str,
)
@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_sparse_steps_are_the_papers(settings, share):
    settings = {"lr": 0.01, **settings}
    ours, theirs = parameters(), parameters()
    optimizer, paper = SparseGradAdam(ours, **settings), PaperAdam(theirs, **settings)
    for step in range(30):
        set_gradients(ours, theirs, step=step, share=share)
        optimizer.step()
        paper.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert (ours[0] - parameters()[0]).abs().max() > 0.01


def test_entries_without_a_gradient_keep_value_and_moments():
    (theta, *_) = params = parameters()
    optimizer = SparseGradAdam(params, lr=0.1, weight_decay=0.1)
    run(optimizer, params, range(5), share=1.0)
    before = [t.clone() for t in (theta.detach(), *(optimizer.state[theta][key] for key in ("exp_avg", "exp_avg_sq")))]
    theta.grad = torch.zeros_like(theta)
    theta.grad[3] = 1.0
    gradient = theta.grad.clone()
    optimizer.step()
    after = [theta.detach(), optimizer.state[theta]["exp_avg"], optimizer.state[theta]["exp_avg_sq"]]
    for a, b in zip(before, after, strict=True):
        assert (a != b).nonzero().tolist() == [[3]]
    assert torch.equal(theta.grad, gradient), "the gradient is still there for whoever logs it"


def test_parameter_without_a_gradient_is_passed_over():
    params = parameters()
    before = params[0].clone()
    optimizer = SparseGradAdam(params)
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    assert torch.equal(params[0], before)
    assert params[0] not in optimizer.state


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-6}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense_groups_are_adamw_bit_for_bit(settings, dtype):
    settings = {"lr": 0.01, "weight_decay": 0.0, **settings}
    ours, theirs = parameters(dtype), parameters(dtype)
    optimizer, adamw = SparseGradAdam(ours, sparse=False, **settings), torch.optim.AdamW(theirs, **settings)
    for step in range(30):
        set_gradients(ours, theirs, step=step)
        optimizer.step()
        adamw.step()
        assert_equal(ours, theirs)


def test_dense_and_sparse_groups_side_by_side():
    ours, alone = parameters(torch.float32), parameters(torch.float32)
    both = SparseGradAdam([{"params": ours[:1], "lr": 0.1}, {"params": ours[1:], "sparse": False}], lr=0.01)
    sparse, dense = SparseGradAdam(alone[:1], lr=0.1), torch.optim.AdamW(alone[1:], lr=0.01, weight_decay=0.0)
    for step in range(10):
        set_gradients(ours, alone, step=step)
        both.step()
        sparse.step()
        dense.step()
    assert_equal(ours, alone)


def mixed(params: list[nn.Parameter]) -> SparseGradAdam:
    return SparseGradAdam(
        [{"params": params[:1]}, {"params": params[1:], "sparse": False, "weight_decay": 0.1}], lr=0.05
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_resumed_run_is_the_uninterrupted_one(tmp_path, dtype):
    through, resumed = parameters(dtype), parameters(dtype)
    run(mixed(through), through, range(12))
    first = mixed(resumed)
    run(first, resumed, range(5))
    torch.save({"optimizer": first.state_dict(), "parameters": [p.data for p in resumed]}, tmp_path / "checkpoint")
    checkpoint = torch.load(tmp_path / "checkpoint")
    restored = [nn.Parameter(data) for data in checkpoint["parameters"]]
    second = mixed(restored)
    second.load_state_dict(checkpoint["optimizer"])
    assert [group["sparse"] for group in second.param_groups] == [True, False]
    run(second, restored, range(5, 12))
    assert_equal(restored, through)


def test_deepcopy_goes_its_own_way():
    params = parameters()
    optimizer = mixed(params)
    run(optimizer, params, range(3))
    copied = copy.deepcopy(optimizer)
    others = [p for group in copied.param_groups for p in group["params"]]
    run(optimizer, params, range(3, 6))
    run(copied, others, range(3, 6))
    assert_equal(params, others)


def test_closure_is_called_with_gradients_enabled_and_its_loss_returned():
    params = parameters()
    optimizer = SparseGradAdam(params, lr=0.1)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert calls == [True] * 20
    assert losses[-1] < 0.5 * losses[0]


def test_scheduler_sets_the_learning_rate_of_every_group():
    ours, theirs = parameters(), parameters()
    optimizer = SparseGradAdam([{"params": ours[:1]}, {"params": ours[1:], "lr": 0.5}], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    paper = [PaperAdam(theirs[:1], lr=0.1), PaperAdam(theirs[1:], lr=0.5)]
    for step in range(6):
        paper[0].lr, paper[1].lr = 0.1 / (1 + step), 0.5 / (1 + step)
        set_gradients(ours, theirs, step=step)
        for each in (optimizer, *paper, scheduler):
            each.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_step_hooks_run_once_per_step():
    """Also where a plain AdamW lives in the same process, whose construction wraps the step that ours calls."""
    params = parameters()
    torch.optim.AdamW(parameters())
    optimizer, counts = mixed(params), {"before": 0, "after": 0}

    def count(which):
        def hook(*args):
            counts[which] += 1

        return hook

    optimizer.register_step_pre_hook(count("before"))
    optimizer.register_step_post_hook(count("after"))
    run(optimizer, params, range(3))
    assert counts == {"before": 3, "after": 3}


@pytest.mark.parametrize(
    ("field", "settings"),
    [("lr", {"lr": -1.0}), ("eps", {"eps": -1e-8}), ("weight_decay", {"weight_decay": -0.1})]
    + [("betas", {"betas": betas}) for betas in ((1.0, 0.9), (0.9, -0.1))],
    ids=str,
)
def test_bad_setting_is_named(field, settings):
    with pytest.raises(ValueError, match=f"`{field}`"):
        SparseGradAdam(parameters(), **settings)


def test_added_group_takes_the_default():
    params = parameters()
    for sparse in (True, False):
        optimizer = SparseGradAdam(params[:1], sparse=sparse)
        optimizer.add_param_group({"params": params[1:]})
        assert [group["sparse"] for group in optimizer.param_groups] == [sparse, sparse]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(8, 24), nn.Linear(24, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.down(torch.tanh(self.up(x))))


def attach(support: str = "dynamic", **settings) -> nn.Module:
    settings = {"density": 0.1, "warmup_steps": 0, "modules_to_save": ["head"], **settings}
    return get_peft_model(Model(), SparseGradConfig(target_modules=["up", "down"], support=support, **settings))


def backward(model, seed: int) -> torch.Tensor:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))
    loss = (model(x) - x[:, :2]).square().mean()
    loss.backward()
    return loss.detach()


def group_names(model, optimizer) -> list[tuple[bool, float, set[str]]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [
        (group["sparse"], group["lr"], {names[p].removeprefix("base_model.model.") for p in group["params"]})
        for group in optimizer.param_groups
    ]


VALUES = {"up.sparsegrad_adapter.default.values", "down.sparsegrad_adapter.default.values"}
HEAD = {"head.modules_to_save.default.weight", "head.modules_to_save.default.bias"}


def test_groups_of_a_dynamic_adapter():
    model = attach()
    optimizer = create_sparsegrad_optimizer(model, lr=0.1, other_lr=0.01, betas=(0.8, 0.9), weight_decay=0.2)
    assert group_names(model, optimizer) == [(True, 0.1, VALUES), (False, 0.01, HEAD)]
    assert {(group["betas"], group["weight_decay"]) for group in optimizer.param_groups} == {((0.8, 0.9), 0.2)}


def test_groups_of_a_static_adapter():
    model = attach("static")
    optimizer = create_sparsegrad_optimizer(model, lr=0.1)
    assert group_names(model, optimizer) == [(False, 0.1, VALUES), (False, 0.1, HEAD)]


def test_groups_without_a_head():
    model = attach(modules_to_save=None)
    assert group_names(model, create_sparsegrad_optimizer(model, lr=0.1)) == [(True, 0.1, VALUES)]


def test_groups_of_two_adapters_with_different_supports():
    model = attach(modules_to_save=None)
    other = SparseGradConfig(target_modules=["up"], density=0.1, warmup_steps=0)
    model.add_adapter("other", other)
    model.base_model.set_adapter(["default", "other"])
    found = group_names(model, create_sparsegrad_optimizer(model, lr=0.1))
    assert found == [(True, 0.1, VALUES), (False, 0.1, {"up.sparsegrad_adapter.other.values"})]


@pytest.mark.parametrize("kind", ["plain", "lora", "inference"])
def test_model_without_values_that_train(kind):
    if kind == "inference":
        model = attach(inference_mode=True)
    else:
        model = get_peft_model(Model(), LoraConfig(target_modules=["up"])) if kind == "lora" else Model()
    with pytest.raises(ValueError, match=r"no SparseGrad (values that train|adapter)"):
        create_sparsegrad_optimizer(model, lr=0.1)


@pytest.mark.parametrize("support", ["dynamic", "static"])
def test_trains_with_clipping_and_accumulation(support):
    model = attach(support)
    optimizer = create_sparsegrad_optimizer(model, lr=0.02)
    losses = []
    for step in range(30):
        losses.append(sum(backward(model, seed) for seed in (2 * step, 2 * step + 1)))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert torch.isfinite(norm)
        assert norm > 0
        optimizer.step()
        optimizer.zero_grad()
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_the_largest_of_accumulated_gradients_are_chosen_once_before_the_step():
    model = attach(modules_to_save=None)
    layer = model.base_model.model.up
    values, k = layer.adapter("default").values, layer.adapter("default").plan.k
    for seed in (0, 1):
        backward(model, seed)
    whole = values.grad.clone()
    assert torch.count_nonzero(whole) > k
    before = values.detach().clone()
    create_sparsegrad_optimizer(model, lr=0.1).step()
    expected = torch.zeros_like(whole).index_fill_(0, whole.abs().topk(k).indices, 1).bool()
    assert torch.equal(values.detach() != before, expected)
    assert torch.equal(values.grad, whole * expected)


def test_a_line_search_is_refused_with_a_dynamic_support():
    model = attach(modules_to_save=None)
    optimizer = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(RuntimeError, match="LBFGS computes several in one"):
        optimizer.step(lambda: backward(model, 0))
    assert not model.base_model.model.up.adapter("default").values.any()


def test_one_step_of_a_dynamic_adapter_moves_k_entries_of_each_layer():
    model = attach(modules_to_save=None)
    backward(model, 0)
    create_sparsegrad_optimizer(model, lr=0.1).step()
    layers = [model.base_model.model.up, model.base_model.model.down]
    moved = [torch.count_nonzero(layer.adapter("default").values).item() for layer in layers]
    assert moved == [layer.adapter("default").plan.k for layer in layers]
    assert all(layer.adapter("default").plan.k < layer.adapter("default").values.numel() for layer in layers)
