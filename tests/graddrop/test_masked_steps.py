"""What optimizers do to masked entries: held, or moved by momentum, as `frozen` says."""

import pytest
import torch
from graddrop_tools import adamw, deltas, dropped, graddrop_layers, kept_now, loss_of, masks_of, sgd, step, tower
from torch import nn

from peft_sparsegrad import GradDrop, GradDropConfig, SparseGradAdam


class NestedAdam(torch.optim.Adam):
    """Moves its parameters after the step of its base class, which is a step of the same optimizer."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.sub_(0.01)
        return loss


def lbfgs(model) -> torch.optim.LBFGS:
    return torch.optim.LBFGS(trained(model), lr=0.1, max_iter=3)


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


@pytest.mark.parametrize("made", [lambda model: adamw(model, weight_decay=0.1), lbfgs], ids=["AdamW", "LBFGS"])
@pytest.mark.parametrize("granularity", ["element", "layer"])
def test_step_with_a_closure_holds_masked_entries(granularity, made):
    model = dropped(tower(), granularity=granularity, p=0.5, frozen="hold", init_weights=False)
    optimizer = made(model)
    kept = {}

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        kept.update(kept_now(masks_of(model), with_blocks(model)))
        return loss

    for number in range(6):
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
