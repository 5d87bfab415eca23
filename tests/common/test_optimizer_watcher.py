"""The watcher of optimizers' steps: what it leaves behind, and steps that run their passes in a closure."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from peft import get_peft_model
from pytorch_optimizer import SAM
from tiny import adapted, batch, llama
from torch import nn

from peft_sparsegrad import GradDrop, GradDropConfig, SparseGradAdam, SparseGradConfig


class Failing(torch.optim.SGD):
    """An optimizer whose step runs out of memory, until there is more of it."""

    fails = True

    def step(self, closure=None):
        if self.fails:
            raise MemoryError
        return super().step(closure)


def test_a_step_that_fails_keeps_neither_its_optimizer_nor_its_parameters_alive():
    """Of any optimizer of the process, once there is an adapter."""
    model, other = adapted(warmup_steps=0), nn.Linear(4, 4)
    optimizer = Failing(other.parameters(), lr=0.1)
    with pytest.raises(MemoryError):
        optimizer.step()
    alive = [weakref.ref(optimizer), weakref.ref(other.weight)]
    del optimizer, other
    gc.collect()
    assert [each() for each in alive] == [None, None]
    assert model(**batch()).loss.isfinite()


def test_a_step_after_one_that_failed_is_counted():
    model = adapted(warmup_steps=0)
    optimizer = Failing([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**batch()).loss.backward()
    with pytest.raises(MemoryError):
        optimizer.step()
    optimizer.fails = False
    optimizer.step()
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert layer.adapter("default").num_steps == 1


def test_an_optimizer_can_be_copied_after_a_step_that_failed():
    model = adapted(warmup_steps=0)
    optimizer = Failing([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(MemoryError):
        optimizer.step()
    assert len(copy.deepcopy(optimizer).param_groups) == 1


def nested(base):
    """A class of optimizers whose step calls that of its base class."""

    class Nested(base):
        def step(self, closure=None):
            return super().step(closure)

    return Nested


class Outer(torch.optim.Optimizer):
    """An optimizer whose step is that of another."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, optimizer.defaults)

    def step(self, closure=None):
        return self.optimizer.step(closure)


class Deaf(torch.optim.SGD):
    """An optimizer that does not call its closure."""

    def step(self, closure=None):
        return super().step()


KINDS = {
    "SparseGrad": SparseGradConfig(density=0.05, warmup_steps=2, renewal_steps=3),
    "dynamic": SparseGradConfig(density=0.05, warmup_steps=2, support="dynamic"),
    "GradDrop": GradDropConfig(p=0.5),
    "GradDrop, held": GradDropConfig(p=0.5, frozen="hold"),
    "Layer-GradDrop": GradDropConfig.from_variant("Layer-GradDrop", p=0.7),
}
HANDED = {
    "by position": lambda optimizer, passes: optimizer.step(passes),
    "by name": lambda optimizer, passes: optimizer.step(closure=passes),
    "empty": lambda optimizer, passes: (passes(), optimizer.step(lambda: None)),
    "to a wrapper": lambda optimizer, passes: Outer(optimizer).step(passes),
}


def trained_by(kind: str, optimizer_class, step, announces: bool = False) -> dict[str, torch.Tensor]:
    """What trains, after steps by `step(optimizer, passes)`, of which some drop all layers."""
    torch.manual_seed(0)
    model = get_peft_model(llama(), KINDS[kind]).train()
    optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], lr=0.02)
    graddrop = GradDrop(model) if announces else None
    for number in range(12):
        if graddrop is not None:
            graddrop.set_step(number)

        def passes(number=number):
            optimizer.zero_grad()
            loss = model(**batch(number % 4)).loss
            loss.backward()
            return loss

        step(optimizer, passes)
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("handed", HANDED)
@pytest.mark.parametrize("made", [lambda base: base, nested], ids=["", "nested"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_with_a_closure_is_the_step_without(kind, made, handed):
    plain = SparseGradAdam if kind == "dynamic" else torch.optim.AdamW
    expected = trained_by(kind, plain, lambda optimizer, passes: (passes(), optimizer.step()))
    found = trained_by(kind, made(plain), HANDED[handed])
    assert all(bool(value.any()) for value in expected.values())
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def by_two_passes(optimizer, passes) -> None:
    """A step of SAM without its closure."""
    passes()
    optimizer.first_step(zero_grad=True)
    passes()
    optimizer.second_step()


@pytest.mark.parametrize("kind", ["SparseGrad", "GradDrop"])
def test_sam_with_a_closure_trains_what_its_two_passes_do(kind):
    """It moves the weights before it calls the closure, where a step with any other optimizer begins."""
    made = partial(SAM, base_optimizer=torch.optim.AdamW)
    expected = trained_by(kind, made, by_two_passes, announces=kind == "GradDrop")
    found = trained_by(kind, made, lambda optimizer, passes: (passes(), optimizer.step(passes)))
    assert all(bool(value.any()) for value in expected.values())
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_sam_with_a_closure_is_refused_with_a_dynamic_support():
    made = partial(SAM, base_optimizer=SparseGradAdam)
    with pytest.raises(RuntimeError, match="SAM computes several in one"):
        trained_by("dynamic", made, lambda optimizer, passes: (passes(), optimizer.step(passes)))


@pytest.mark.parametrize("kind", ["GradDrop, held", "Layer-GradDrop"])
def test_sam_with_a_closure_is_refused_with_masks_that_are_held(kind):
    made = partial(SAM, base_optimizer=torch.optim.AdamW)
    with pytest.raises(RuntimeError, match="set frozen='gradient'"):
        trained_by(kind, made, lambda optimizer, passes: (passes(), optimizer.step(passes)))


def test_a_closure_returns_its_loss():
    model = adapted(warmup_steps=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    assert optimizer.step(lambda: 3.0) == 3.0


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_that_does_not_call_its_closure_is_refused(kind):
    with pytest.raises(RuntimeError, match="Deaf was given a closure and has taken a step without calling it"):
        trained_by(kind, Deaf, lambda optimizer, passes: (passes(), optimizer.step(passes)))


def test_an_optimizer_of_other_parameters_need_not_call_its_closure():
    model, other = adapted(warmup_steps=0), nn.Linear(4, 4)
    before = other.weight.detach().clone()
    other(torch.ones(4)).sum().backward()
    Deaf(other.parameters(), lr=0.1).step(lambda: None)
    assert not torch.equal(other.weight, before)
    assert model(**batch()).loss.isfinite()
