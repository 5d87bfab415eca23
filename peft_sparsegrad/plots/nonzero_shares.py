"""The share of ∂L/∂Y that is not zero, measured while a model trains.

Chekalina et al., *SparseGrad* (2024.emnlp-main.831), section 3.3 and figure 3. The paper does not say from what size
on an entry counts as non-zero, so there are two counts: the entries that are not exactly 0, and the largest entries
that hold 99% of the energy, which is the sum of squares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..sparsegrad.layer import SparseGradLayer

ENERGY = 0.99  # share of the energy that the largest entries are to hold


@dataclass(frozen=True)
class NonzeroShares:
    """Shares, in [0, 1], of one layer's ∂L/∂Y (tokens, out) in one backward pass.

    Attributes:
        rows: Share of the rows, one for each token, that hold an entry other than 0.
        entries: Share of the entries that are not 0.
        needed: Share of the entries, the largest, that hold 99% of the energy.
        needed_changed: The same of ∂L/∂Y V (tokens, r_out), after the change of basis; None without V.
    """

    rows: float
    entries: float
    needed: float
    needed_changed: float | None


def nonzero_shares(gradient: torch.Tensor, V: torch.Tensor | None = None) -> NonzeroShares:
    """Return how much of ∂L/∂Y is not zero.

    Args:
        gradient: ∂L/∂Y, shape (tokens, out).
        V: Output transition matrix (out, r_out), or None for the identity.

    Raises:
        ValueError: If the gradient is not finite.
    """
    dy = gradient.detach().float()
    if not torch.isfinite(dy).all():
        raise ValueError("∂L/∂Y has NaN or infinite entries: measure it without a loss scaler, in float32 or bfloat16")
    nonzero = dy != 0
    return NonzeroShares(
        rows=nonzero.any(1).float().mean().item(),
        entries=nonzero.float().mean().item(),
        needed=_needed(dy),
        needed_changed=None if V is None else _needed(dy @ V.detach().to(dy)),
    )


def _needed(matrix: torch.Tensor) -> float:
    """Return the share of entries, the largest, that hold 99% of a matrix's energy; 0 if all are 0."""
    largest_first = np.sort(matrix.square().flatten().cpu().numpy())[::-1]  # many times faster than torch's sort
    energy = largest_first.cumsum(dtype=np.float64)
    return (1 + int(np.searchsorted(energy, ENERGY * energy[-1]))) / len(energy) if energy[-1] > 0 else 0.0


@contextmanager
def recorded_nonzero_shares(
    model: nn.Module, adapter_name: str = "default"
) -> Iterator[dict[str, list[NonzeroShares]]]:
    """Record the `NonzeroShares` of an adapter's layers for every backward pass inside the `with` block.

    Args:
        model: Model with a SparseGrad adapter.
        adapter_name: Name of the adapter, whose bases are used.

    Yields:
        A dict that fills up: by the name of a layer, its shares in one backward pass after the other.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SparseGradLayer) and module.has_adapter(adapter_name)
    }
    found: dict[str, list[NonzeroShares]] = {name: [] for name in layers}

    def record(name: str, gradient: torch.Tensor) -> None:
        found[name].append(nonzero_shares(gradient, layers[name].adapter(adapter_name).basis.V))

    with observed_output_gradients({name: model.get_submodule(name) for name in layers}, record):
        yield found


@contextmanager
def observed_output_gradients(
    layers: Mapping[str, nn.Module], observe: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """Call `observe(name, ∂L/∂Y)`, of shape (tokens, out), in every backward pass through one of the layers."""

    def hook_of(name: str) -> Callable[[nn.Module, object, torch.Tensor], None]:
        def hook(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda gradient: observe(name, gradient.reshape(-1, gradient.shape[-1])))

        return hook

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_hook(hook_of(name)).remove)
        yield
