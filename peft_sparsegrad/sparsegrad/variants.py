"""Names for settings of `SparseGradConfig`: the default, the paper's two methods, and what lies beside them."""

from __future__ import annotations

from typing import Any

VARIANTS: dict[str, dict[str, Any]] = {
    "sparsegrad": {},
    "columns": {"basis": "columns"},
    "full-bases": {"rank": "full"},
    "sparsegrad-dynamic": {"support": "dynamic"},
    "paper": {"rank": "full", "basis": "hosvd", "support": "dynamic"},
    "meprop": {"basis": "identity", "renewal_steps": 0},
    "meprop-paper": {"basis": "identity", "support": "dynamic"},
}
"""Settings by name.

`sparsegrad` is the default: a basis on the input side, and a static support that is renewed. `columns` has input
columns of each weight in place of the basis: the cheapest warm-up and the smallest file. `full-bases` has two full
bases in place of that one. `sparsegrad-dynamic` is the default's core with a support chosen anew in each step. `paper`
is SparseGrad as published (sections 3 and 5.1): two full bases, the whole core, the largest gradients of each step.
`meprop-paper` is its rival there, the same in the weight's own basis, and `meprop` that with a support chosen once.
The dynamic ones train with `create_sparsegrad_optimizer`, the paper's masked Adam.
"""
