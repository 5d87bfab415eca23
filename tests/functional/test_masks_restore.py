"""`restore_` puts back what a mask does not keep; remembered masks are drawn once."""

import pytest
import torch
from mask_tools import CPU, DTYPES, KEY, normal

from peft_sparsegrad.functional import GradientMask, bernoulli_mask, masks, set_mask, streams

REMEMBERED = pytest.mark.parametrize("make", [lambda: bernoulli_mask(KEY, 0.3, True), lambda: set_mask(KEY, 1, 1, 3)])


@REMEMBERED
@DTYPES
def test_a_remembered_mask_does_what_it_did_when_it_was_drawn(make, dtype):
    count = 4 * streams._CHUNK + 3
    gradient, before, mask = normal(count, dtype=dtype), normal(count, dtype=dtype).flip(0), make()
    mask.is_remembered = True
    for _ in range(3):
        restored = gradient.clone()
        mask.restore_(restored, before)
        assert torch.equal(restored, torch.where(make().keep(gradient.shape, CPU), gradient, before))
        assert torch.equal(mask.apply_(gradient.clone()), make().apply_(gradient.clone()))
        assert torch.equal(mask.keep(gradient.shape, CPU), make().keep(gradient.shape, CPU))


@REMEMBERED
def test_a_remembered_mask_is_drawn_once(make, monkeypatch):
    mask, calls = make(), []
    draw = masks.draw_in_parts
    monkeypatch.setattr(masks, "draw_in_parts", lambda *args: calls.append(1) or draw(*args))
    for remembers, expected in ((False, 3), (True, 4)):
        mask.is_remembered = remembers
        for _ in range(3):
            mask.apply_(torch.ones(50))
        assert len(calls) == expected


@DTYPES
@pytest.mark.parametrize("shape", [(), (5,), (7, 9), (3, 5, 2, 2)])
def test_restore_puts_back_what_is_not_kept(dtype, shape):
    changed, before, mask = normal(*shape, dtype=dtype), -normal(*shape, dtype=dtype), bernoulli_mask(KEY, 0.5, True)
    expected = torch.where(mask.keep(changed.shape, CPU), changed, before)
    mask.restore_(changed, before)
    assert torch.equal(changed, expected)


def test_restore_of_memory_in_another_order():
    changed, before, mask = normal(6, 4).T, normal(4, 6), bernoulli_mask(KEY, 0.5, True)
    expected = torch.where(mask.keep(changed.shape, CPU), changed, before)
    mask.restore_(changed, before)
    assert torch.equal(changed, expected)


def test_restore_of_what_keeps_nothing_or_everything():
    for mask, which in ((GradientMask(0.0), 1), (GradientMask(1.0), 0)):
        tensors = [normal(9), normal(9) + 1]
        expected = tensors[which].clone()
        mask.restore_(*tensors)
        assert torch.equal(tensors[0], expected)
