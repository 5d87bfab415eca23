"""Figures of docs/results/gpu.md: the lines that `python -m benchmarks.gpu --table` prints, once there are results."""

from __future__ import annotations

from documents import Claim
from measured import RESULTS

from benchmarks.gpu.table import tables
from experiments.json_files import read_json

RESULT = read_json(RESULTS / "gpu.json")
LINES = [] if RESULT is None else [" ".join(line.split()) for line in tables(RESULT).splitlines() if line]


def to_lora(contender: str, kind: str, shape: str = "bert", tokens: int = 1024) -> float:
    """What a contender takes, `median_ms` or bytes, as a share of what LoRA of rank 16 does."""
    rows = {(row["shape"], row["tokens"], row["contender"]): row[kind] for row in (RESULT or {})["rows"]}
    return rows[shape, tokens, contender] / rows[shape, tokens, "lora r=16"]


CLAIMS = [
    *(Claim("docs/results/gpu.md", "{}", lambda line=line: [line]) for line in LINES),
    Claim(
        "docs/results/gpu.md",
        "are {:.2f} and {:.2f} of rank 16",
        lambda: [to_lora(name, "median_ms") for name in ("lora r=8", "lora r=64")],
    ),
]
GIVEN = []
