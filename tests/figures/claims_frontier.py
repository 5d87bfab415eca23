"""Figures of docs/results/frontier.md: what the tables of two benchmarks print from committed results."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

from documents import Claim, Given
from measured import RESULTS

from benchmarks.compare.difference import interval
from benchmarks.crosslingual.series import load
from benchmarks.crosslingual.table import tables as tables_by_language
from benchmarks.frontier.selection import load as load_frontier
from benchmarks.frontier.table import tables

PAGE = "docs/results/frontier.md"
LONG = RESULTS / "frontier_smollm2.jsonl"
SHORT = RESULTS / "frontier_smollm2_short.jsonl"
ON_CPU = RESULTS / "frontier_smollm2_cpu.jsonl"
DEFAULT, EIGHT = "SparseGrad 1%, warm-up of 6", "SparseGrad 1%"
WIDER, COLUMNS = "SparseGrad 1%, slack 12", "SparseGrad columns 1%"
NARROW, FOUR = "SparseGrad narrow sides 1%", "SparseGrad narrow sides 1%, warm-up of 4"
LORA, ALL_LINEAR = "LoRA r=8", "LoRA r=8, all-linear"
PRINTED = [
    tables([LONG], [RESULTS / "frontier_costs.jsonl"]),
    tables([SHORT], []),
    tables([ON_CPU], []),
    tables([RESULTS / "frontier_mpnet.jsonl"], [RESULTS / "frontier_costs_mpnet.jsonl"]),
    tables_by_language(load([RESULTS / "crosslingual.jsonl"]), "graddrop-off"),
]
PARTS = [" ".join(part.split()) for text in PRINTED for part in re.split(r"^#+ .*$", text, flags=re.MULTILINE)]


def runs(method: str, file: Path = SHORT) -> list[dict[str, Any]]:
    """The records of a method on a CPU, by seed; in 60 passes, unless a file of others is given."""
    (series,) = (each for each in load_frontier([file], [])["smollm2"] if each.method == method)
    return [series.records[seed] for seed in sorted(series.records)]


def rate_of_short_runs(method: str) -> float:
    """The method's best learning rate there."""
    return runs(method)[0]["run"]["lr"]


def less(other: str, method: str, file: Path = SHORT) -> list[float]:
    """A method's loss on answers less another's, by the seeds of both."""
    own, others = ({run["run"]["seed"]: run["score"] for run in runs(name, file)} for name in (method, other))
    return [own[seed] - others[seed] for seed in sorted(own.keys() & others.keys())]


def to(other: str, method: str, file: Path = SHORT) -> list[object]:
    """A method's mean loss less another's, and the interval of the differences."""
    behind = less(other, method, file)
    return [statistics.fmean(behind), *interval(behind)]


def less_elsewhere(method: str, file: Path = SHORT, rows: str = "other_loss") -> list[float]:
    """A method's loss on other text, or on other `rows`, less LoRA's, by seed."""
    own, lora = ([run["after"][rows] for run in runs(name, file)] for name in (method, LORA))
    return [one - other for one, other in zip(own, lora, strict=True)]


def elsewhere_to_lora(method: str, file: Path = SHORT, rows: str = "other_loss") -> list[object]:
    """A method's mean loss on other text, or on other `rows`, less LoRA's, and the interval of the differences."""
    behind = less_elsewhere(method, file, rows)
    return [statistics.fmean(behind), *interval(behind)]


def after_150(method: str, rate: float) -> list[float]:
    """The loss on answers and on other text of the first seed after 150 passes at a learning rate."""
    (series,) = (each for each in load_frontier([LONG], [])["smollm2"] if each.method == method)
    record = series.searched[rate]
    return [record["score"], record["after"]["other_loss"]]


def worth(method: str) -> list[float]:
    """What the warm-up was worth in steps, least and most over the seeds that it was recorded with."""
    found = [record["warmup_worth"] for record in runs(method) if record["warmup_worth"]]
    return [min(found), max(found)]


CLAIMS = [
    *(Claim(PAGE, "{}", lambda part=part: [part]) for part in PARTS if part),
    Claim(PAGE, "default's two seeds: the input sides {:+.4f} and {:+.4f}", lambda: less(NARROW, EIGHT)[:2]),
    Claim(PAGE, "with 12 entries a value {:+.4f} and {:+.4f}", lambda: less(NARROW, WIDER)),
    Claim(PAGE, "columns {:+.4f} and {:+.4f}", lambda: less(NARROW, COLUMNS)[:2]),
    Claim(PAGE, "a warm-up of 4 passes {:+.4f} and {:+.4f}", lambda: less(NARROW, FOUR)),
    Claim(PAGE, "the default is {:+.4f} ({:+.4f} to {:+.4f}) from LoRA of rank 8", lambda: to(LORA, DEFAULT)),
    Claim(PAGE, "after a warm-up of 8 passes {:+.4f} ({:+.4f} to {:+.4f})", lambda: to(LORA, EIGHT)),
    Claim(PAGE, "columns {:+.4f} ({:+.4f} to {:+.4f})", lambda: to(LORA, COLUMNS)),
    Claim(PAGE, "6 passes in place of 8 are {:+.4f} ({:+.4f} to {:+.4f}) in loss", lambda: to(EIGHT, DEFAULT)),
    Claim(
        PAGE,
        "the difference is {:+.4f} ({:+.4f} to {:+.4f}), and after 8 passes {:+.4f} ({:+.4f} to {:+.4f}).",
        lambda: [*elsewhere_to_lora(DEFAULT), *elsewhere_to_lora(EIGHT)],
    ),
    Claim(
        PAGE,
        "seed 0 at {:.4f} on the answers and {:.3f} on other text, and at their own at {:.4f} and {:.3f}, where LoRA "
        "ended at {:.4f} and {:.3f}",
        lambda: [*after_150(EIGHT, 4e-4), *after_150(EIGHT, 1e-3), *after_150(LORA, 4e-4)],
    ),
    Claim(
        PAGE,
        "on the answers by {:+.4f}, {:+.4f}, {:+.4f}, {:+.4f} and {:+.4f}, on average {:+.4f} ({:+.4f} to {:+.4f}).",
        lambda: [*less(LORA, DEFAULT, ON_CPU), *to(LORA, DEFAULT, ON_CPU)],
    ),
    Claim(
        PAGE,
        "on text of another kind the difference is {:+.4f} ({:+.4f} to {:+.4f}), on the rows of the search "
        "{:+.4f} ({:+.4f} to {:+.4f})",
        lambda: [
            *elsewhere_to_lora(DEFAULT, ON_CPU),
            *elsewhere_to_lora(DEFAULT, ON_CPU, "search_loss"),
        ],
    ),
    Claim(PAGE, "today's default ends {:.4f} below LoRA r=8", lambda: [-to(LORA, DEFAULT, ON_CPU)[0]]),
    Claim(PAGE, "was {:.4f} lower than that on the MLP's", lambda: [-to(LORA, ALL_LINEAR, LONG)[0]]),
    Claim(PAGE, "6 passes was worth {:.1f} to {:.1f} steps,", lambda: worth(DEFAULT)),
    Claim(PAGE, "one of 8 {:.1f},", lambda: worth(EIGHT)[:1]),
    Claim(PAGE, "columns' {:.1f} to {:.1f},", lambda: worth(COLUMNS)),
    Claim(PAGE, "the earlier default's {:.1f},", lambda: worth(NARROW)[:1]),
    Claim(PAGE, "a warm-up of 4 passes {:.1f} to {:.1f}.", lambda: worth(FOUR)),
]
OF_SETTINGS = (
    "a warm-up of 4 passes",
    "60 passes of 4 conversations",
    "tried at 0.001, their best, and 0.0025",
    "6 passes at 0.001 only",
    "At LoRA's, 0.0004",
    "150 passes of 8 at 0.0004, where LoRA did best",
    "prefer 0.001",
)
GIVEN = [Given(PAGE, words, "setting") for words in OF_SETTINGS]
