"""Figures of docs/results/gpu.md: the lines that `python -m benchmarks.gpu --table` prints, once there are results."""

from __future__ import annotations

from documents import Claim
from measured import RESULTS

from benchmarks.gpu.table import tables
from experiments.json_files import read_json

RESULT = read_json(RESULTS / "gpu.json")
LINES = [] if RESULT is None else [" ".join(line.split()) for line in tables(RESULT).splitlines() if line]

CLAIMS = [Claim("docs/results/gpu.md", "{}", lambda line=line: [line]) for line in LINES]
GIVEN = []
