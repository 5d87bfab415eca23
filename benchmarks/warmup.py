"""The warm-up's streaming HOSVD against the SVDs of the stacked gradients that the authors' code computes.

The stack has 180 gradients of shape (384, 1536), as from 15 steps of a MiniLM with 12 blocks. The authors decompose
all three of its unfoldings. Exact Gram matrices start from the same gradients as the SVDs do, the sketch from the x
and dy of the backward pass: it forms no gradient. Making the input is not timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from experiments.memory import peak_of, storages
from peft_sparsegrad.functional import ExactHosvd, Hosvd, SketchedHosvd

from .gradients import Gradients
from .timing import Stopwatch

OUT, IN, TOKENS = 384, 1536, 256
CORE = (96, 96)
STACKED, FEW, FLAT = 180, 20, 24
# A sketch is swept until a sweep adds less than this share of captured energy.
TOLERANCE, MAX_SWEEPS = 0.005, 6

Accumulator = ExactHosvd | SketchedHosvd


def benchmark_warmup(device: torch.device) -> dict[str, Any]:
    """Measure the accumulators and the stacked SVD on a decaying spectrum, and the sketch on a flat one."""
    core = CORE
    separated = min(core) // 2
    decaying = Gradients(OUT, IN, TOKENS, decay=0.5, leading=separated, drop=4.0, device=device)
    stack = decaying.stack(STACKED)
    U, V, stacked = stacked_svd(stack, core)
    methods = {"stacked SVD": {**stacked, "energy": captured_energy(stack, U, V)}}
    for name, make in _accumulators(core, device).items():
        found, measured = stream(make(), decaying)
        methods[name] = {
            **measured,
            "peak_bytes": streaming_peak(make(), decaying),
            "speed_ratio": stacked["seconds"] / measured["seconds"],
            "energy": captured_energy(stack, *both_sides(found)),
            "angle_in": largest_angle(both_sides(found)[0][:, :separated], U[:, :separated]),
            "angle_out": largest_angle(both_sides(found)[1][:, :separated], V[:, :separated]),
        }
    settings = {"stack": list(stack.shape), "core": list(core), "tokens": TOKENS, "angle_rank": separated}
    return {**settings, "methods": methods, "flat spectrum": flat_spectrum(core, device)}


def _accumulators(core: tuple[int, int], device: torch.device) -> dict[str, Callable[[], Accumulator]]:
    return {
        "exact": lambda: ExactHosvd(OUT, IN, core, device),
        "sketch": lambda: SketchedHosvd(OUT, IN, core, device),
    }


def stacked_svd(stack: torch.Tensor, core: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """SVDs of the three unfoldings of a stack (n, out, in).

    Returns:
        U (in, r_in), V (out, r_out), and the seconds and the peak bytes, those of the stack among them.
    """
    left, seconds = [], []

    def decompose() -> None:
        for mode in range(3):
            with Stopwatch(stack.device) as watch:
                unfolding = stack.movedim(mode, 0).reshape(stack.shape[mode], -1)
                left.append(torch.linalg.svd(unfolding, full_matrices=False).U)
            seconds.append(watch.seconds)

    peak = stack.nbytes + peak_of(decompose, stack.device)
    measured = {"seconds": sum(seconds), "seconds_by_unfolding": seconds, "peak_bytes": peak}
    return left[2][:, : core[1]], left[1][:, : core[0]], measured


def stream(accumulator: Accumulator, gradients: Gradients) -> tuple[Hosvd, dict[str, Any]]:
    """Run an accumulator over `STACKED` gradients, a sketch as often as a sweep still adds energy.

    Returns:
        What it found, and the seconds, the sweeps, the bytes that it held after few and after all of the gradients.
    """
    watch, captured, held = Stopwatch(gradients.device), [], {}
    while not _is_settled(accumulator, captured):
        for index in range(STACKED):
            update = _update(accumulator, gradients, index)
            with watch:
                update()
            held[index + 1] = held_bytes(accumulator)
        with watch:
            accumulator.finish_sweep()
        captured.append(_leading_energy(accumulator.result()))
    with watch:
        found = accumulator.result()
    held = {n: held[n] for n in (FEW, STACKED)}
    return found, {"seconds": watch.seconds, "sweeps": len(captured), "held_bytes": held}


def _is_settled(accumulator: Accumulator, captured: list[float]) -> bool:
    """Whether another sweep would add next to nothing to the energies captured after each sweep so far."""
    if isinstance(accumulator, ExactHosvd):
        return len(captured) == 1
    if len(captured) < 2:
        return False
    return captured[-1] - captured[-2] <= TOLERANCE * captured[-1] or len(captured) == MAX_SWEEPS


def _leading_energy(found: Hosvd) -> float:
    """The energy along the columns of U and V together."""
    U, V = both_sides(found)
    return (found.spectrum_in[: U.shape[1]].sum() + found.spectrum_out[: V.shape[1]].sum()).item()


def _update(accumulator: Accumulator, gradients: Gradients, index: int) -> Callable[[], None]:
    """The update with one gradient, its input made already."""
    x, dy = gradients(index)
    if isinstance(accumulator, ExactHosvd):
        return functools.partial(accumulator.add_gradient, dy.T @ x)
    return functools.partial(accumulator.update, x, dy)


def streaming_peak(accumulator: Accumulator, gradients: Gradients) -> int:
    """Peak bytes of an accumulator: its own, those of one gradient and those of finishing."""
    x, dy = gradients(0)

    def once() -> None:
        accumulator.update(x, dy)
        accumulator.finish_sweep()
        accumulator.result()

    return held_bytes(accumulator) + x.nbytes + dy.nbytes + peak_of(once, gradients.device)


def held_bytes(accumulator: Accumulator) -> int:
    """Bytes of the tensors in an accumulator."""
    parts = [accumulator, *(part for part in vars(accumulator).values() if hasattr(part, "__dict__"))]
    tensors = [v for part in parts for v in vars(part).values() if isinstance(v, torch.Tensor)]
    return sum(storages(tensors).values())


def both_sides(found: Hosvd) -> tuple[torch.Tensor, torch.Tensor]:
    """U and V of a HOSVD that has both."""
    assert found.U is not None
    assert found.V is not None
    return found.U, found.V


def captured_energy(stack: torch.Tensor, U: torch.Tensor, V: torch.Tensor) -> float:
    """Share of the energy Σ‖G‖² of a stack (n, out, in) that Vᵀ G U holds."""
    U, V = U.to(stack), V.to(stack)
    return ((V.T @ stack @ U).double().square().sum() / stack.double().square().sum()).item()


def largest_angle(first: torch.Tensor, second: torch.Tensor) -> float:
    """Largest principal angle, in radians, between the column spaces of two matrices (n, r)."""
    a, b = (torch.linalg.qr(matrix.cpu().double()).Q for matrix in (first, second))
    sine = torch.linalg.matrix_norm(b - a @ (a.T @ b), ord=2)  # the cosine would round small angles to zero
    return torch.asin(sine.clamp(max=1)).item()


def flat_spectrum(core: tuple[int, int], device: torch.device) -> dict[str, Any]:
    """Return the energy that the sketch captures over that of the exact basis, where no direction stands out."""
    gradients = Gradients(OUT, IN, TOKENS, decay=0.0, leading=0, drop=1.0, device=device)
    stack = gradients.stack(FLAT)
    exact, sketch = ExactHosvd(OUT, IN, core, device), SketchedHosvd(OUT, IN, core, device)
    for gradient in stack:
        exact.add_gradient(gradient)
    best, shares, captured = _energy(stack, exact), [], []
    while not _is_settled(sketch, captured):
        for index in range(FLAT):
            sketch.update(*gradients(index))
        sketch.finish_sweep()
        captured.append(_leading_energy(sketch.result()))
        shares.append(_energy(stack, sketch) / best)
    return {"gradients": FLAT, "exact_energy": best, "sketch_share_by_sweep": shares}


def _energy(stack: torch.Tensor, accumulator: Accumulator) -> float:
    return captured_energy(stack, *both_sides(accumulator.result()))
