"""The table at the head of docs/results/comparison.md: where SparseGrad stands to each method on each task."""

from __future__ import annotations

from functools import partial

from documents import Claim, Given
from measured import COLA, STORIES, STSB, standing

ROWS = {
    "LoRA": "lora",
    "static MeProp": "meprop",
    "SHiRA": "shira",
    "Super-Tuning": "supertuning",
    "its own dynamic support": "sparsegrad-dynamic",
    "full fine-tuning of the same weights": "full",
}


def verdicts(other: str) -> list[str]:
    """`ahead`, `level` or `behind`, for each task."""
    return [standing(task, "sparsegrad", other) for task in (STORIES, STSB, COLA)]


CLAIMS = [
    Claim("docs/results/comparison.md", f"| {name} | {{}} | {{}} | {{}} |", partial(verdicts, other))
    for name, other in ROWS.items()
]
GIVEN = [Given("docs/results/comparison.md", "by the 95% interval", "setting")]
