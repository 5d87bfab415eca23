"""Linear layers that are not what they look like, on which an adapter would be wrong or do nothing.

Some subclasses of `Linear` compute something else, and some modules read the weights of their layers without calling
them, so that what wraps a layer never runs.
"""

from __future__ import annotations

import re
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

# Class of the parent, and the children whose weights it reads. Those of Mamba are read by its CUDA kernels.
_READ_WITHOUT_A_CALL = [
    (r"WavLMAttention", {"q_proj", "k_proj", "v_proj", "out_proj"}),
    (r"\w*(Mamba|Bamba|FalconH1)\w*(Mixer|Layer)", {"x_proj", "dt_proj", "out_proj", "norm"}),
]


def check_layer(name: str, module: nn.Module, model: nn.Module) -> None:
    """Refuse a target module on which an adapter would be wrong or do nothing.

    Raises:
        TypeError: If it is one. The message names it and the way out.
    """
    problem = problem_of(name, module, model)
    if problem is not None:
        raise TypeError(f"the target module {name!r} is {problem}. Set `exclude_modules`.")


def problem_of(name: str, module: nn.Module, model: nn.Module) -> str | None:
    """Return what is wrong with a layer as a target, in words that follow `is`, or None if nothing is.

    Args:
        name: Name of the layer in the model.
        module: The layer, without adapters.
        model: The model.
    """
    parent = model.get_submodule(name.rpartition(".")[0])
    if _is_read_without_a_call(name.rpartition(".")[2], parent):
        return (
            f"part of a {type(parent).__name__}, which reads its weight without calling it, so that an adapter on it "
            "would do nothing"
        )
    if _looks_linear(module) and not _computes_linear(module):
        return f"a {type(module).__name__}, a kind of Linear that computes something else from its weight"
    return None


def _is_read_without_a_call(child: str, parent: nn.Module) -> bool:
    if isinstance(parent, nn.MultiheadAttention):
        return True
    kind = type(parent).__name__
    return any(child in children and re.fullmatch(pattern, kind) for pattern, children in _READ_WITHOUT_A_CALL)


def _looks_linear(module: nn.Module) -> bool:
    """Return whether a module is of a subclass of `Linear` or `Conv1D` that has a forward pass of its own."""
    if not isinstance(module, (nn.Linear, Conv1D)):
        return False
    base = nn.Linear if isinstance(module, nn.Linear) else Conv1D
    return type(module).forward is not base.forward


def _computes_linear(module: Any) -> bool:
    """Return whether a layer multiplies a small input by its weight and adds its bias.

    A weight that is quantised or split has a layer that knows how to use it, of which this cannot judge.
    """
    weight, bias = module.weight, module.bias
    if type(weight) is not nn.Parameter or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return True
    if weight.ndim != 2 or not weight.numel():
        return True
    matrix = weight.T if isinstance(module, Conv1D) else weight
    with torch.no_grad():
        x = torch.linspace(-1, 1, 2 * matrix.shape[1], device=weight.device).view(2, -1).to(weight.dtype)
        expected = F.linear(x, matrix, bias)
        try:
            found = cast(Any, type(module)).forward(module, x)
        except (RuntimeError, TypeError, ValueError, IndexError):  # it takes other inputs than a linear layer
            return False
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
        return False
    return found.is_meta or torch.allclose(found.float(), expected.float(), rtol=1e-2, atol=1e-2)
