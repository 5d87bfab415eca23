"""The gradient of a weight from its factors, in each precision, against float64."""

import pytest
import torch

from peft_sparsegrad.functional import core_gradient, gradient_energy, weight_gradient

OUT, IN = 24, 36
# How far an entry may be from float64, as a share of the sum of the magnitudes that it adds up.
ERROR = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 1e-6}
DTYPES = pytest.mark.parametrize("dtype", ERROR)


def factors(tokens, dtype, x_dtype=None):
    """x (tokens, in) and dy (tokens, out)."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(tokens, n, dtype=torch.float64, generator=generator) for n in (IN, OUT))
    return x.to(x_dtype or dtype), dy.to(dtype)


@DTYPES
def test_weight_gradient(dtype):
    x, dy = factors(50, dtype)
    gradient = weight_gradient(x, dy)
    assert gradient.dtype == torch.promote_types(dtype, torch.float32)
    magnitudes = dy.double().abs().T @ x.double().abs()
    assert ((gradient.double() - dy.double().T @ x.double()).abs() < ERROR[dtype] * magnitudes).all()


def test_a_layer_under_autocast_has_the_gradient_that_autograd_computes():
    """Its input may be in float32 still; the product of the layer, and that of its gradient, are in bfloat16."""
    x, dy = factors(50, torch.bfloat16, x_dtype=torch.float32)
    weight = torch.randn(OUT, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        torch.nn.functional.linear(x, weight).backward(dy)
    assert torch.equal(weight_gradient(x, dy), weight.grad)


def test_a_sum_that_float16_cannot_hold_does_not_overflow():
    x, dy = torch.full((1000, 2), 100.0).half(), torch.full((1000, 3), 100.0).half()
    assert torch.equal(weight_gradient(x, dy), torch.full((3, 2), 1e7))


@DTYPES
@pytest.mark.parametrize("tokens", [1, 3, 14, 15, 200])  # 24 · 36 / (24 + 36) = 14.4 tokens separate the branches
def test_gradient_energy(tokens, dtype):
    x, dy = factors(tokens, dtype)
    expected = (dy.double().T @ x.double()).square().sum()
    energy = gradient_energy(x, dy)
    assert energy.dtype == torch.promote_types(dtype, torch.float32)
    rtol = {torch.float64: 1e-12, torch.bfloat16: 5e-3}.get(dtype, 1e-4)
    torch.testing.assert_close(energy.double(), expected, rtol=rtol, atol=0)


@DTYPES
def test_core_gradient(dtype):
    x, dy = factors(9, dtype)
    U, V = torch.randn(IN, 4, dtype=torch.float64), torch.randn(OUT, 3, dtype=torch.float64)
    G = dy.double().T @ x.double()
    for found, expected in (
        (core_gradient(x, dy, U, V), V.T @ G @ U),
        (core_gradient(x, dy, None, None), G),
        (core_gradient(x, dy, torch.tensor([0, 7]), None), G[:, [0, 7]]),
    ):
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        error = (found.double() - expected).norm() / expected.norm()
        assert error < (0.01 if dtype == torch.bfloat16 else 1e-5)


def test_core_gradient_is_formed_where_the_input_is():
    """A group's basis is on one device, and in a model that is spread over several the layers are on others."""
    x, dy = torch.randn(5, 8, device="meta"), torch.randn(5, 6, device="meta")
    assert core_gradient(x, dy, torch.randn(8, 4), torch.randn(6, 3)).device.type == "meta"
