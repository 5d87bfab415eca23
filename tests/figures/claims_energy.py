"""The table of docs/results/sparsegrad.md that `benchmarks.energy` prints from its committed results."""

from __future__ import annotations

from documents import Claim
from measured import RESULTS

from benchmarks.energy import table
from experiments.results import read_json_lines

PRINTED = " ".join(table(read_json_lines(RESULTS / "energy.jsonl")).split())

CLAIMS = [Claim("docs/results/sparsegrad.md", "{}", lambda: [PRINTED])]
GIVEN = []
