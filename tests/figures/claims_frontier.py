"""Figures of docs/results/frontier.md: what the tables of two benchmarks print from committed results."""

from __future__ import annotations

import re
import statistics
from typing import Any

from documents import Claim, Given
from measured import RESULTS

from benchmarks.compare.difference import interval
from benchmarks.crosslingual.series import load
from benchmarks.crosslingual.table import tables as tables_by_language
from benchmarks.frontier.selection import load as load_frontier
from benchmarks.frontier.table import tables

PAGE = "docs/results/frontier.md"
SHORT = RESULTS / "frontier_smollm2_short.jsonl"
DEFAULT, WIDER, COLUMNS = "SparseGrad 1%", "SparseGrad 1%, slack 12", "SparseGrad columns 1%"
NARROW, FOUR = "SparseGrad narrow sides 1%", "SparseGrad narrow sides 1%, warm-up of 4"
LORA = "LoRA r=8"
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


def rate_of_short_runs(method: str) -> float:
    """The method's best learning rate there."""
    return of_short_runs(method)[0]["run"]["lr"]


def less(other: str, method: str) -> list[float]:
    """A method's loss on answers less another's, by the seeds of both."""
    own, others = ({run["run"]["seed"]: run["score"] for run in of_short_runs(name)} for name in (method, other))
    return [own[seed] - others[seed] for seed in sorted(own.keys() & others.keys())]


def to_lora(method: str) -> list[object]:
    """A method's mean loss less LoRA's at its best rate, and the interval of the differences."""
    behind = less(LORA, method)
    return [statistics.fmean(behind), *interval(behind)]


def worth(method: str) -> list[float]:
    """What the warm-up was worth in steps, least and most over the seeds that it was recorded with."""
    found = [record["warmup_worth"] for record in of_short_runs(method) if record["warmup_worth"]]
    return [min(found), max(found)]


CLAIMS = [
    *(Claim(PAGE, "{}", lambda part=part: [part]) for part in PARTS if part),
    Claim(PAGE, "default's two seeds: the default {:+.4f} and {:+.4f}", lambda: less(NARROW, DEFAULT)[:2]),
    Claim(PAGE, "with 12 entries a value {:+.4f} and {:+.4f}", lambda: less(NARROW, WIDER)),
    Claim(PAGE, "columns {:+.4f} and {:+.4f}", lambda: less(NARROW, COLUMNS)[:2]),
    Claim(PAGE, "a warm-up of 4 passes {:+.4f} and {:+.4f}", lambda: less(NARROW, FOUR)),
    Claim(PAGE, "the default is {:+.4f} ({:+.4f} to {:+.4f}) from LoRA of rank 8", lambda: to_lora(DEFAULT)),
    Claim(PAGE, "columns {:+.4f} ({:+.4f} to {:+.4f})", lambda: to_lora(COLUMNS)),
    Claim(PAGE, "8 passes was worth {:.1f} steps,", lambda: worth(DEFAULT)[:1]),
    Claim(PAGE, "columns' {:.1f} to {:.1f},", lambda: worth(COLUMNS)),
    Claim(PAGE, "the earlier default's {:.1f},", lambda: worth(NARROW)[:1]),
    Claim(PAGE, "a warm-up of 4 passes {:.1f} to {:.1f}.", lambda: worth(FOUR)),
]
OF_SETTINGS = (
    "a warm-up of 4 passes",
    "60 passes of 4 conversations",
    "tried at 0.001, their best, and 0.0025",
)
GIVEN = [Given(PAGE, words, "setting") for words in OF_SETTINGS]
