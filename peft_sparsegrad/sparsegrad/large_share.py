"""The warning that an adapter trains a large share of the weights that it adapts."""

from __future__ import annotations

import math
import warnings

from torch import nn

from ..common.placement import whole_shape
from ..functional.core_size import FEWEST_VALUES
from .plan import LayerPlan

_LARGE = 0.1  # of a layer's entries


def warn_of_large_share(model: nn.Module, plans: list[LayerPlan]) -> None:
    """Warn if more than a tenth of some layer's entries train, with the shares of that layer and of the model.

    Layers so small that they train the fewest values that any layer does are left out.
    """
    shares = [(plan.k / math.prod(plan.parameter_shape), plan) for plan in plans if plan.k_of_expert > FEWEST_VALUES]
    share, plan = max(shares, key=lambda pair: pair[0], default=(0.0, None))
    if plan is None or round(share, 2) <= _LARGE:
        return
    whole = sum(plan.k for plan in plans) / sum(map(_num_entries, model.parameters()))
    warnings.warn(
        f"SparseGrad trains {plan.k:,} of the {math.prod(plan.parameter_shape):,} entries of {plan.name!r} "
        f"({share:.0%}), and {whole:.0%} of the model; time, memory and file grow with that: `density=0.01` trains 1% "
        "of each layer.",
        stacklevel=2,
    )


def _num_entries(parameter: nn.Parameter) -> int:
    """Return the number of entries of a parameter, of a 4-bit one the number before they were packed."""
    packed_from = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return math.prod(whole_shape(parameter) if packed_from is None else packed_from)
