"""How large the core S of an adapter is: the shape follows from the values asked for, never from data."""

from __future__ import annotations

import math
from typing import Literal

Rank = int | tuple[int, int] | Literal["full", "auto"]

# Entries of the core per trained value when rank="auto". A core that is hardly larger than its support leaves nothing
# to choose; a wide one costs time, memory and bytes. docs/results/ has the measurements behind the number.
SLACK = 1.5
# Fewer values than this say nothing in a layer so small that its density asks for them.
FEWEST_VALUES = 8


def num_trained_values(out_features: int, in_features: int, density: float, num_values: int | None = None) -> int:
    """Number k of trained values of a layer: `num_values`, else `density` times its entries, but 8 if it has them."""
    if num_values is not None:
        return num_values
    entries = out_features * in_features
    return max(min(FEWEST_VALUES, entries), round(density * entries))


def core_shape(out_features: int, in_features: int, k: int, rank: Rank) -> tuple[int, int]:
    """Shape (r_out, r_in) of the core that holds `k` trained values.

    `"auto"` takes the nearly square pair with `r_out * r_in ≈ SLACK * k`. The pair with the fewest multiply-adds took
    4% less of a BERT step and held 3 to 5% less of the gradient's energy on its support (docs/results/sparsegrad.md).

    Args:
        out_features: Rows of the weight.
        in_features: Columns of the weight.
        k: Trained values.
        rank: One rank for both sides, a pair (out, in), `"full"`, or `"auto"`.

    Returns:
        (r_out, r_in), each at most the layer's dimension.

    Raises:
        ValueError: If `k` values do not fit into the core, or into the layer.
    """
    if k > out_features * in_features:
        raise ValueError(f"{k} values do not fit into a weight of shape ({out_features}, {in_features})")
    if rank == "full":
        return out_features, in_features
    if rank == "auto":
        return _nearly_square(out_features, in_features, k)
    asked_out, asked_in = (rank, rank) if isinstance(rank, int) else rank
    r_out, r_in = min(asked_out, out_features), min(asked_in, in_features)
    if r_out * r_in < k:
        raise ValueError(
            f"a core of rank ({r_out}, {r_in}) has {r_out * r_in} entries and cannot hold {k} values: "
            f"raise `rank` to at least {math.isqrt(k - 1) + 1}, or lower `density` or `num_values`"
        )
    return r_out, r_in


def _nearly_square(out_features: int, in_features: int, k: int) -> tuple[int, int]:
    entries = min(math.ceil(SLACK * k), out_features * in_features)
    side = _round_up(math.isqrt(entries - 1) + 1)
    r_in = min(side, in_features)
    r_out = min(max(side if r_in == side else 0, _round_up(math.ceil(entries / r_in))), out_features)
    if r_out == out_features:
        r_in = min(max(r_in, _round_up(math.ceil(entries / r_out))), in_features)
    return r_out, r_in


def _round_up(rank: int) -> int:
    """To a multiple of 8 where that is a small change: matrix units work in tiles."""
    return rank if rank < 32 else -(-rank // 8) * 8
