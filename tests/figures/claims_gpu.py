"""Figures of docs/results/gpu.md: the lines that `python -m benchmarks.gpu --table` prints, once there are results."""

from __future__ import annotations

from documents import Claim
from measured import RESULTS

from benchmarks.gpu.table import tables
from experiments.json_files import read_json

RESULT = read_json(RESULTS / "gpu.json")
NARROWER, COLUMNS = "sparsegrad, narrower sides", "columns, slack 12"  # what was measured there
LINES = [] if RESULT is None else [" ".join(line.split()) for line in tables(RESULT).splitlines() if line]


def to_lora(contender: str, kind: str, shape: str = "bert", tokens: int = 1024) -> float:
    """What a contender takes, `median_ms`, `least_ms` or bytes, as a share of what LoRA of rank 16 does."""
    rows = {
        (row["shape"], row["tokens"], row["contender"]): {**row, "least_ms": min(row["ms"])}[kind]
        for row in (RESULT or {})["rows"]
    }
    return rows[shape, tokens, contender] / rows[shape, tokens, "lora r=16"]


def noise_of_the_least() -> tuple[float, float]:
    """Least and greatest share of the other ranks of LoRA at BERT's shape, which do nearly the same work."""
    shares = [to_lora(f"lora r={rank}", "least_ms", tokens=n) for rank in (8, 32, 64) for n in (1024, 4096)]
    return min(shares), max(shares)


CLAIMS = [
    *(Claim("docs/results/gpu.md", "{}", lambda line=line: [line]) for line in LINES),
    Claim(
        "docs/results/gpu.md",
        "are {:.2f} and {:.2f} of rank 16",
        lambda: [to_lora(name, "median_ms") for name in ("lora r=8", "lora r=64")],
    ),
    Claim("docs/results/gpu.md", "at {:.2f} to {:.2f} of rank 16", noise_of_the_least),
    Claim(
        "docs/results/gpu.md",
        "smallest at BERT's, {:.2f} and {:.2f} of LoRA's, and {:.2f} and {:.2f} at LLaMA's",
        lambda: [to_lora(COLUMNS, "peak_bytes", shape, n) for shape in ("bert", "llama") for n in (1024, 4096)],
    ),
    Claim(
        "docs/results/gpu.md",
        "at {:.2f} and {:.2f} with the small batches",
        lambda: [to_lora(NARROWER, "least_ms", shape) for shape in ("bert", "llama")],
    ),
    Claim(
        "docs/results/gpu.md",
        "at {:.2f} and {:.2f} with the large ones",
        lambda: [to_lora(NARROWER, "least_ms", shape, 4096) for shape in ("bert", "llama")],
    ),
]
GIVEN = []
