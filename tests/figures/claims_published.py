"""Figures of the published method's costs in docs/results/sparsegrad.md, by its name and beside the others."""

from __future__ import annotations

import json
import statistics
from functools import cache
from typing import Any

from claims_cards import SHAPES
from documents import Claim, Given
from measured import RESULTS, memory_to_lora, step

from benchmarks.compare.difference import interval
from peft_sparsegrad import SparseGradConfig

PAGE, VARIANTS, MPNET = "docs/results/sparsegrad.md", "bench_variants", "glue_mpnet.jsonl"
STSB, COLA = "glue_mpnet_stsb.jsonl", "glue_mpnet_cola.jsonl"
DEFAULT, NARROWER = "sparsegrad", "sparsegrad, narrower sides"
OF_MPNET = {
    "full": "regular fine-tuning",
    "lora": "LoRA, rank 7",
    DEFAULT: "`sparsegrad`",
    NARROWER: "`sparsegrad`, narrower sides",
    "meprop-paper": "`meprop-paper`",
    "paper": "`paper`",
}


def row_of_bench(name: str) -> Claim:
    """A variant's row: trained values, time and peak memory against LoRA's, for each shape."""

    def values() -> list[float]:
        return [
            each
            for shape in SHAPES
            for each in (
                step(shape, name, VARIANTS)["trained"],
                *(step(shape, name, VARIANTS)["to_lora"][kind] for kind in ("median", "min", "max")),
                memory_to_lora(shape, name, "peak", VARIANTS),
            )
        ]

    cells = " | ".join(2 * ["{:,} | {:.2f} ({:.2f}–{:.2f}) | {:.2f}"])
    return Claim(PAGE, f"| `{name}` | {cells} |", values)


@cache
def records_of(file: str) -> list[dict[str, Any]]:
    """The runs of a file."""
    return [json.loads(line) for line in (RESULTS / file).read_text("utf-8").splitlines()]


def name_of(record: dict[str, Any]) -> str:
    """The method of a run, an earlier default by a name of its own."""
    return NARROWER if '"narrower"' in record["run"]["settings"] else record["run"]["method"]


def of(record: dict[str, Any]) -> tuple[str, str]:
    """What is done with the rest of the model in a run, and the method."""
    return record["run"]["rest"], name_of(record)


@cache
def of_mpnet() -> dict[str, dict[str, Any]]:
    """The records of the runs on all-mpnet-base-v2, by the method."""
    return {name_of(record): record for record in records_of(MPNET)}


def megabytes(method: str, *names: str) -> list[float]:
    """Costs of a run in MB."""
    return [of_mpnet()[method]["costs"][name] / 1e6 for name in names]


def row_of_mpnet(method: str) -> Claim:
    """A method's row: trained parameters, those of a layer in a step, and bytes."""

    def values() -> list[float]:
        trained = of_mpnet()[method]["trainable"]
        sizes = megabytes(method, "peak_memory", "optimizer_bytes", "saved_bytes")
        return [trained["model"] / 1e6, trained["layer"], trained["layer_in_step"], *sizes]

    return Claim(
        PAGE, f"| {OF_MPNET[method]} | {{:.1f}} mln | {{:,}} | {{:,}} | {{:,.0f}} | {{:,.0f}} | {{:,.0f}} |", values
    )


def peaks_to(other: str) -> list[float]:
    """Peak memory of the published method as a ratio to another's."""
    return [megabytes("paper", "peak_memory")[0] / megabytes(other, "peak_memory")[0]]


@cache
def scores(rest: str, method: str, file: str = STSB) -> tuple[float, list[float]]:
    """The learning rate at which a method was run with all three seeds, and its scores in percent by seed."""
    found: dict[float, dict[int, float]] = {}
    for record in records_of(file):
        run = record["run"]
        if of(record) == (rest, method):
            found.setdefault(run["lr"], {})[run["seed"]] = 100 * record["score"]
    ((rate, by_seed),) = ((rate, by_seed) for rate, by_seed in found.items() if len(by_seed) == 3)
    return rate, [by_seed[seed] for seed in range(3)]


def fewer_in_a_step() -> float:
    """By how many percent a step of the published method moves fewer values of a layer than LoRA has."""
    moved = {name_of(each): each["trainable"]["layer_in_step"] for each in records_of(STSB)}
    return 100 * (1 - moved["paper"] / moved["lora"])


def ruined_by_rate(rest: str, method: str) -> list[float]:
    """The learning rates at which nothing was learned, a correlation below a tenth."""
    own = (each for each in records_of(STSB) if of(each) == (rest, method))
    return sorted(each["run"]["lr"] for each in own if each["score"] < 0.1)


def edge(rest: str, method: str, file: str = STSB) -> str:
    """A star if the method's rate is the least or the greatest of those tried."""
    tried = {each["run"]["lr"] for each in records_of(file) if of(each) == (rest, method)}
    return "*" if scores(rest, method, file)[0] in (min(tried), max(tried)) else ""


@cache
def costs_frozen(method: str) -> list[float]:
    """Peak memory, optimizer state and file with the rest frozen, in MB."""
    record = next(each for each in records_of(STSB) if of(each) == ("frozen", method))
    return [record["costs"][name] / 1e6 for name in ("peak_memory", "optimizer_bytes", "saved_bytes")]


def row_of_stsb(method: str) -> Claim:
    """A method's row: score, rate, difference to LoRA with the rest frozen; score and rate with it trained; bytes."""
    less_lora = "–" if method == "lora" else "{:+.1f} ({:+.1f} to {:+.1f})"
    frozen, trained = ("{:.1f} ± {:.1f} | {:g}" + edge(rest, method) for rest in ("frozen", "trained"))
    cells = f"{frozen} | {less_lora} | {trained} | {{:,.0f}} | {{:,.0f}} | {{:,.0f}}"

    def values() -> list[float]:
        rate, own = scores("frozen", method)
        differences = [one - other for one, other in zip(own, scores("frozen", "lora")[1], strict=True)]
        difference = [] if method == "lora" else [statistics.mean(differences), *interval(differences)]
        rate_trained, trained = scores("trained", method)
        return [*with_half(own), rate, *difference, *with_half(trained), rate_trained, *costs_frozen(method)]

    return Claim(PAGE, f"| {OF_MPNET[method]} | {cells} |", values)


def row_of_cola(method: str) -> Claim:
    """A method's row on CoLA: score, rate and difference to LoRA, with the rest frozen and with it trained."""
    less_lora = "–" if method == "lora" else "{:+.1f} ({:+.1f} to {:+.1f})"
    cells = (f"{{:.1f}} ± {{:.1f}} | {{:g}}{edge(rest, method, COLA)} | {less_lora}" for rest in ("frozen", "trained"))

    def values() -> list[float]:
        return [number for rest in ("frozen", "trained") for number in on_cola(rest, method)]

    return Claim(PAGE, f"| {OF_MPNET[method]} | {' | '.join(cells)} |", values)


def on_cola(rest: str, method: str) -> list[float]:
    """A method's mean, half of its interval, rate and, but for LoRA, its difference to LoRA with its interval."""
    (rate, own), (_, lora) = scores(rest, method, COLA), scores(rest, "lora", COLA)
    differences = [one - other for one, other in zip(own, lora, strict=True)]
    return [
        *with_half(own),
        rate,
        *([] if method == "lora" else [statistics.mean(differences), *interval(differences)]),
    ]


def with_half(numbers: list[float]) -> tuple[float, float]:
    """The mean, and half of Student's 95% interval."""
    low, high = interval(numbers)
    return statistics.mean(numbers), (high - low) / 2


CLAIMS = [
    *(row_of_stsb(name) for name in OF_MPNET if name != DEFAULT),
    *map(row_of_cola, OF_MPNET),
    *(row_of_bench(name) for name in SparseGradConfig.variants),
    *map(row_of_mpnet, OF_MPNET),
    Claim(PAGE, "published method moves {:.0f}% fewer values than LoRA of rank 7 has", lambda: [fewer_in_a_step()]),
    Claim(PAGE, "it takes {:.2f} times the memory of regular fine-tuning", lambda: peaks_to("full")),
    Claim(PAGE, "and {:.2f} times LoRA's", lambda: peaks_to("lora")),
]
GIVEN = [
    Given(PAGE, "20% less than regular fine-tuning", "section 4 of the SparseGrad paper"),
    Given(PAGE, "same model: 3,200 rows once", "setting"),
    Given(PAGE, "4.3 steps a second beside 4.1 and 4.7", "table 3 of the SparseGrad paper"),
]
