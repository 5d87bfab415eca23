"""The size of an adapter's core S, which follows from the number of trained values and never from data."""

from __future__ import annotations

import math
from typing import Literal

Rank = int | tuple[int | None, int | None] | Literal["full", "auto", "narrower"]

# In a small layer the density may ask for fewer values than this, which would be too few to learn anything.
FEWEST_VALUES = 8


def num_trained_values(out_features: int, in_features: int, density: float, num_values: int | None = None) -> int:
    """Return the number k of trained values of a layer.

    This is `num_values` if given, otherwise `density` times the number of the layer's entries, but at least 8 if the
    layer has that many entries.
    """
    if num_values is not None:
        return num_values
    entries = out_features * in_features
    return max(min(FEWEST_VALUES, entries), round(density * entries))


def core_ranks(out_features: int, in_features: int, k: int, rank: Rank, slack: float) -> tuple[int | None, int | None]:
    """Return the numbers of columns (r_out, r_in) of V and U for a core that holds `k` trained values.

    `"auto"` gives the input side a basis of r columns, such that `r * out ≈ slack * k`, and leaves the output side in
    the weight's own: that is where the energy of gradients is found in few directions, whether it is the narrower side
    or not (docs/results/sparsegrad.md, "Where gradients compress"), and of the layer's input the backward pass then
    needs r numbers a token. `"narrower"` gives the narrower side a basis, with `r * wider side ≈ slack * k`.

    Args:
        out_features: Rows of the weight.
        in_features: Columns of the weight.
        k: Trained values.
        rank: One rank for both sides, a pair (out, in) of which one or both may be None, `"full"`, `"auto"` or
            `"narrower"`.
        slack: Entries of the core per trained value where the rank is not given as a number, at least 1.

    Returns:
        For each side a number of columns, at most the layer's dimension, or None if that side keeps the weight's own
        basis.

    Raises:
        ValueError: If `k` values do not fit into the core, or into the layer.
    """
    if k > out_features * in_features:
        raise ValueError(f"{k} values do not fit into a weight of shape ({out_features}, {in_features})")
    if rank == "full":
        return out_features, in_features
    if rank == "narrower" and out_features < in_features:
        return _columns_for(slack * k, in_features, out_features), None
    if rank in ("auto", "narrower"):
        return None, _columns_for(slack * k, out_features, in_features)
    asked_out, asked_in = (rank, rank) if isinstance(rank, int) else rank
    ranks = (_at_most(asked_out, out_features), _at_most(asked_in, in_features))
    r_out, r_in = core_shape(out_features, in_features, ranks)
    if r_out * r_in < k:
        raise ValueError(
            f"a core of rank ({r_out}, {r_in}) has {r_out * r_in} entries and cannot hold {k} values: "
            f"raise `rank` to at least {math.isqrt(k - 1) + 1}, or lower `density` or `num_values`"
        )
    return ranks


def core_shape(out_features: int, in_features: int, ranks: tuple[int | None, int | None]) -> tuple[int, int]:
    """Return the numbers of rows and columns of the core; a side that keeps its own basis is as wide as the layer."""
    r_out, r_in = ranks
    return (out_features if r_out is None else r_out), (in_features if r_in is None else r_in)


def _columns_for(entries: float, other: int, features: int) -> int:
    """Return the columns of a side with `features`, so that the core, as wide as `other`, has that many entries."""
    return min(_round_up(math.ceil(entries / other)), features)


def _at_most(rank: int | None, features: int) -> int | None:
    return None if rank is None else min(rank, features)


def _round_up(rank: int) -> int:
    """Round a rank of at least 32 up to a multiple of 8, because matrix units work in tiles."""
    return rank if rank < 32 else -(-rank // 8) * 8
