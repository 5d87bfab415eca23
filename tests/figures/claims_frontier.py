"""Figures of docs/results/frontier.md: what the tables of two benchmarks print from committed results."""

from __future__ import annotations

import re

from documents import Claim
from measured import RESULTS

from benchmarks.crosslingual.series import load
from benchmarks.crosslingual.table import tables as tables_by_language
from benchmarks.frontier.table import tables

PAGE = "docs/results/frontier.md"
PRINTED = [
    tables([RESULTS / "frontier_smollm2.jsonl"], [RESULTS / "frontier_costs.jsonl"]),
    tables([RESULTS / "frontier_mpnet.jsonl"], [RESULTS / "frontier_costs_mpnet.jsonl"]),
    tables_by_language(load([RESULTS / "crosslingual.jsonl"]), "graddrop-off"),
]
PARTS = [" ".join(part.split()) for text in PRINTED for part in re.split(r"^#+ .*$", text, flags=re.MULTILINE)]

CLAIMS = [Claim(PAGE, "{}", lambda part=part: [part]) for part in PARTS if part]
GIVEN = []
