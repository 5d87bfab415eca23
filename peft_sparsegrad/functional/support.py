"""The support, which is the set of core entries that train: how it is chosen and renewed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SupportScore:
    """A way to rank the entries of a core by the gradients G̃ of several backward passes.

    Attributes:
        of_pass: Called with the gradient of one pass, (r_out, r_in) and at least float32; returns the pass's share of
            the total, which is a sum over passes.
        of_total: Called with the total; returns the score of each entry, where larger is better.
    """

    of_pass: Callable[[torch.Tensor], torch.Tensor]
    of_total: Callable[[torch.Tensor], torch.Tensor]


SUPPORT_SCORES = {
    "mean": SupportScore(lambda gradient: gradient, torch.abs),  # |Σ G̃|
    "energy": SupportScore(torch.square, lambda total: total),  # Σ G̃²
}


def select_support(score: torch.Tensor, k: int) -> torch.Tensor:
    """Return the `k` entries with the highest score.

    Args:
        score: Score of each entry, of any shape. It is moved to the CPU, so that every device picks the same entries
            when scores are equal.
        k: Number of entries to select.

    Returns:
        Sorted flat indices, int64, shape (k,).

    Raises:
        ValueError: If the score is not finite.
    """
    return select_supports(score.reshape(1, -1), k)


def select_supports(score: torch.Tensor, k: int) -> torch.Tensor:
    """Return the `k` entries with the highest score of each of several cores, as `select_support` does of one.

    Args:
        score: Score of each entry, shape (cores, entries).
        k: Number of entries to select of each core.

    Returns:
        Sorted flat indices into the cores one after the other, int64, shape (cores * k,).

    Raises:
        ValueError: If the score is not finite.
    """
    score = score.detach().cpu()
    if not torch.isfinite(score).all():
        raise ValueError("the scores that choose the support contain NaN or Inf")
    starts = torch.arange(len(score)).unsqueeze(1) * score.shape[1]
    return (torch.topk(score, k, sorted=False).indices.sort().values + starts).flatten()


def spread_support(num_entries: int, k: int) -> torch.Tensor:
    """Return one entry from each of `k` equal stretches of the core: a data-free support, the same on every machine.

    Returns:
        Sorted flat indices, int64, shape (k,). The global random state is not touched.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    edges = torch.arange(k + 1, device="cpu") * num_entries // k
    offset = torch.rand(k, dtype=torch.float64, generator=generator, device="cpu") * edges.diff()
    return edges[:-1] + offset.long()


def renew_support(indices: torch.Tensor, values: torch.Tensor, score: torch.Tensor, fraction: float) -> torch.Tensor:
    """Return a support in which the entries of the smallest values are replaced by those with the highest score.

    Every other entry keeps its slot, so that whatever was copied from the values remains right for it. An entry that
    is dropped may be among those with the highest score; it then stays in its slot too.

    Args:
        indices: Flat positions of the values, shape (k,).
        values: Trained values at these positions, shape (k,).
        score: Score of every entry of the core, of any shape with that number of entries; larger is better.
        fraction: Share of the values to drop, rounded down.

    Returns:
        Flat positions, int64, shape (k,), in which new entries have the slots of dropped ones, both in rising order.
    """
    dropped = values.detach().abs().topk(int(fraction * len(values)), largest=False, sorted=False).indices
    survives = torch.ones_like(indices, dtype=torch.bool).index_fill_(0, dropped, False)
    grown = score.flatten().index_fill(0, indices[survives], -torch.inf).topk(len(dropped), sorted=False).indices
    freed = ~survives & ~torch.isin(indices, grown)
    renewed = indices.clone()
    renewed[freed] = grown[~torch.isin(grown, indices)].sort().values
    return renewed


def keep_largest(gradient: torch.Tensor, k: int) -> torch.Tensor:
    """Return `gradient` (n,) with all but its `k` entries of largest magnitude set to zero: a dynamic support."""
    if k >= gradient.numel():
        return gradient
    kept = gradient.abs().topk(k, sorted=False).indices
    return torch.zeros_like(gradient).index_copy(0, kept, gradient[kept])
