"""The device of these tests, each of which has two forms.

    pytest -m gpu tests/gpu        on CUDA
    pytest -m slow tests/gpu       the same tests on the CPU: a dry run

Where only torch, transformers, peft, accelerate and pytest are installed, `-o addopts=` leaves out the options of
`pyproject.toml` that ask for plug-ins: `python -m pytest -o addopts= -m gpu tests/gpu`.
"""

from __future__ import annotations

import pytest
import torch

CPU = pytest.param("cpu", marks=pytest.mark.slow)
CUDA = pytest.param("cuda:0", marks=pytest.mark.gpu)


@pytest.fixture(params=[CPU, CUDA])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Return the device under test, always compared with float64 on the CPU."""
    if request.param != "cpu" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)
