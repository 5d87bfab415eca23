"""Tables that a command prints."""

from __future__ import annotations

import re

from documents import Claim, Given, text
from measured import RESULTS

from benchmarks.compare.table import tables

RANK_MEMORY = "docs/guides/rank-memory.md"


def printed(page: str, results: str, against: str) -> list[Given]:
    """What `python -m benchmarks.compare table` prints, in paragraphs."""
    paragraphs = tables([RESULTS / f"{results}.jsonl"], against).split("\n\n")
    return [Given(page, " ".join(each.split()), "python -m benchmarks.compare table") for each in paragraphs]


CLAIMS: list[Claim] = []
GIVEN = [
    *printed("docs/results/comparison.md", "comparison", "lora"),
    *printed("docs/results/comparison.md", "ablation", "lora"),
    *printed("docs/results/graddrop.md", "graddrop", "graddrop-off"),
    *(
        Given(RANK_MEMORY, rows, "tests/figures/test_printed_tables.py")
        for rows in re.findall(r"\| engine \|.*?\|(?= ##|$)", text(RANK_MEMORY))
    ),
    *(
        Given(RANK_MEMORY, words, "tests/figures/test_printed_tables.py")
        for words in ("1.2 GiB for a 7B model", "of which 0.9 GiB are")
    ),
    Given(RANK_MEMORY, "is 1 GB in bfloat16 by default", "DeepSpeed's documentation: 5e8 elements"),
]
