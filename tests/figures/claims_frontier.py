"""Figures of docs/results/frontier.md: what the tables of two benchmarks print from committed results."""

from __future__ import annotations

import re
from typing import Any

from documents import Claim, Given
from measured import RESULTS

from benchmarks.crosslingual.series import load
from benchmarks.crosslingual.table import tables as tables_by_language
from benchmarks.frontier.selection import load as load_frontier
from benchmarks.frontier.table import tables

PAGE = "docs/results/frontier.md"
SHORT = RESULTS / "frontier_smollm2_short.jsonl"
DEFAULT, FOUR, COLUMNS = "SparseGrad 1%", "SparseGrad 1%, warm-up of 4", "SparseGrad columns 1%, slack 4"
INPUT_SIDES = "SparseGrad input sides"
PRINTED = [
    tables([RESULTS / "frontier_smollm2.jsonl"], [RESULTS / "frontier_costs.jsonl"]),
    tables([SHORT], []),
    tables([RESULTS / "frontier_mpnet.jsonl"], [RESULTS / "frontier_costs_mpnet.jsonl"]),
    tables_by_language(load([RESULTS / "crosslingual.jsonl"]), "graddrop-off"),
]
PARTS = [" ".join(part.split()) for text in PRINTED for part in re.split(r"^#+ .*$", text, flags=re.MULTILINE)]


def of_short_runs(method: str) -> list[dict[str, Any]]:
    """The records of a method in 60 passes on a CPU, by seed."""
    (series,) = (each for each in load_frontier([SHORT], [])["smollm2"] if each.method == method)
    return [series.records[seed] for seed in sorted(series.records)]


def less_default(method: str) -> list[float]:
    """The loss on answers less that of SparseGrad's default, by seed."""
    pairs = zip(of_short_runs(method), of_short_runs(DEFAULT), strict=True)
    return [own["score"] - other["score"] for own, other in pairs]


def to_lora(method: str) -> float:
    """A method's loss on answers less LoRA's, with the one seed that LoRA has at its best rate."""
    return of_short_runs(method)[0]["score"] - of_short_runs("LoRA r=8")[0]["score"]


def worth(method: str) -> list[float]:
    """What the warm-up was worth in steps, least and most over the seeds that it was recorded with."""
    found = [record["warmup_worth"] for record in of_short_runs(method) if record["warmup_worth"]]
    return [min(found), max(found)]


CLAIMS = [
    *(Claim(PAGE, "{}", lambda part=part: [part]) for part in PARTS if part),
    Claim(PAGE, "columns {:+.4f} and {:+.4f}", lambda: less_default(COLUMNS)),
    Claim(PAGE, "input sides {:+.4f} and {:+.4f}", lambda: less_default(INPUT_SIDES)),
    Claim(PAGE, "a warm-up of 4 passes {:+.4f} and {:+.4f}", lambda: less_default(FOUR)),
    Claim(PAGE, "columns are {:+.4f} from LoRA of rank 8", lambda: [to_lora(COLUMNS)]),
    Claim(PAGE, "was worth {:.1f} to {:.1f} steps,", lambda: worth(FOUR)),
    Claim(PAGE, "columns' {:.1f} to {:.1f},", lambda: worth(COLUMNS)),
    Claim(PAGE, "the default's {:.1f}.", lambda: worth(DEFAULT)[:1]),
]
OF_SETTINGS = (
    "a warm-up of 4 passes",
    "60 passes of 4 conversations",
    "SparseGrad at 0.001",
    "rate, 0.0025, was",
    "with 150 passes of 8",
)
GIVEN = [Given(PAGE, words, "setting") for words in OF_SETTINGS]
