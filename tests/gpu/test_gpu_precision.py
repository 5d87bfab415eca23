"""Outputs and gradients on the device, in every precision, against the float64 twin; LoRA is the control."""

from __future__ import annotations

import pytest
import torch
from gpu_twins import CONFIGS, attached, disturb, double_twin, outcome, relative_error

METHODS = pytest.mark.parametrize("name", CONFIGS)


def errors(
    name: str, device: torch.device, autocast: torch.autocast | None = None, base: torch.dtype = torch.float32
) -> tuple[float, ...]:
    """Relative errors of the logits and of the gradient."""
    model = attached(CONFIGS[name](), base)
    disturb(model)
    twin = double_twin(model)
    found, true = outcome(model.to(device), autocast), outcome(twin)
    return tuple(relative_error(*pair) for pair in zip(found, true, strict=True))


@METHODS
def test_float32_is_exact_to_rounding(name, device):
    logits, gradient = errors(name, device)
    assert logits < 1e-5
    assert gradient < 1e-5


@METHODS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)], ids=str)
def test_autocast_is_as_exact_as_its_numbers(name, device, dtype, tolerance):
    logits, gradient = errors(name, device, torch.autocast(device.type, dtype))
    assert logits < tolerance
    assert gradient < tolerance


@METHODS
def test_a_base_in_bfloat16_is_as_exact_as_its_numbers(name, device):
    """Under autocast, as the Trainer's `bf16=True` trains it."""
    logits, gradient = errors(name, device, torch.autocast(device.type, torch.bfloat16), torch.bfloat16)
    assert logits < 0.05
    assert gradient < 0.05
