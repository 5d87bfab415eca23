"""The size of an adapter's core S, which follows from the number of trained values and never from data."""

from __future__ import annotations

import math
from typing import Literal

Rank = int | tuple[int | None, int | None] | Literal["full", "auto"]

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


def column_ranks(
    out_features: int, in_features: int, k: int, rank: Rank, slack: float
) -> tuple[int | None, int | None]:
    """Return (None, r_in) for a core whose input side is a choice of r_in of the weight's columns.

    With `"auto"` there are as many as `slack * k` entries take: columns of the input side in any case, whether it is
    the narrower one or not, because that is where the energy of gradients is found in few of them.

    Raises:
        ValueError: If `k` values do not fit into the core, or into the layer.
    """
    if rank == "auto":
        rank = _round_up(math.ceil(slack * k / out_features))
    return core_ranks(out_features, in_features, k, (None, rank) if isinstance(rank, int) else rank, slack)


def core_ranks(out_features: int, in_features: int, k: int, rank: Rank, slack: float) -> tuple[int | None, int | None]:
    """Return the numbers of columns (r_out, r_in) of V and U for a core that holds `k` trained values.

    `"auto"` puts a transition matrix on the narrower side only, with r columns such that
    `r * wider side ≈ slack * k`. In an MLP the wider side is that of the hidden neurons, each of which is a direction
    of its own; the narrower side is the residual stream, where no direction is special.
    docs/results/comparison.md measures the gain and the cost of this choice.

    Args:
        out_features: Rows of the weight.
        in_features: Columns of the weight.
        k: Trained values.
        rank: One rank for both sides, a pair (out, in) of which one or both may be None, `"full"`, or `"auto"`.
        slack: Entries of the core per trained value where the rank is `"auto"`, at least 1.

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
    if rank == "auto":
        return _narrower_side(out_features, in_features, slack * k)
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


def _narrower_side(out_features: int, in_features: int, entries: float) -> tuple[int | None, int | None]:
    narrow, wide = sorted((out_features, in_features))
    rank = min(_round_up(math.ceil(entries / wide)), narrow)
    return (rank, None) if out_features < in_features else (None, rank)


def _at_most(rank: int | None, features: int) -> int | None:
    return None if rank is None else min(rank, features)


def _round_up(rank: int) -> int:
    """Round a rank of at least 32 up to a multiple of 8, because matrix units work in tiles."""
    return rank if rank < 32 else -(-rank // 8) * 8
