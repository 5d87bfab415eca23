"""Figures of the README."""

from __future__ import annotations

import statistics
from functools import cache
from typing import Any

from claims_cards import SHAPES
from claims_frontier import (
    COLUMNS,
    DEFAULT,
    EIGHT,
    LORA,
    NARROW,
    ON_CPU,
    elsewhere_to_lora,
    rate_of_short_runs,
    runs,
    to,
    worth,
)
from claims_gpu import COLUMNS as WIDER_COLUMNS
from claims_gpu import NARROWER, RESULT, to_lora
from claims_published import COLA as PUBLISHED_COLA
from claims_published import NARROWER as NARROWER_SIDES
from claims_published import ruined_by_rate, scores
from claims_speed import LEAN, cost_on_mpnet, many, on_mpnet, readings
from documents import Claim, Given
from measured import COLA, RESULTS, STORIES, STSB, best_rate, memory_to_lora, time_to_lora

from benchmarks.frontier.selection import Series, load

README = "README.md"
BATCHES = [("bert", 1024), ("bert", 4096), ("llama", 1024), ("llama", 4096)]


@cache
def frontier(task: str) -> dict[str, Series]:
    """The runs of a task by method, each at its best learning rate."""
    file = "frontier_smollm2.jsonl" if task == "smollm2" else "frontier_mpnet.jsonl"
    return {series.method: series for series in load([RESULTS / file], [RESULTS / "frontier_costs.jsonl"])[task]}


def score(record: dict[str, Any]) -> float:
    """The score of a run."""
    return record["score"]


def loss(method: str) -> float:
    """Mean loss on SmolLM2's answers."""
    return statistics.fmean(frontier("smollm2")[method].scores)


def of_columns(kind: str) -> list[float]:
    """The least and the greatest share of LoRA's bytes."""
    shares = [to_lora(WIDER_COLUMNS, kind, *batch) for batch in BATCHES]
    return [min(shares), max(shares)]


def loss_of_short_runs(method: str) -> float:
    """Mean loss on SmolLM2's answers after the short runs."""
    return statistics.fmean(map(score, runs(method)))


def lost_at_a_quarter() -> float:
    """What a quarter of the values costs in loss, by the seed that both have."""
    few, many = (
        frontier("smollm2")[f"SparseGrad narrow sides {density}"].records[0]["score"] for density in ("0.25%", "1%")
    )
    return few - many


def warmup(contender: str, name: str) -> list[float]:
    """The cost of a warm-up at both shapes, with the smaller batch."""
    rows = {(row["shape"], row["contender"], row["tokens"]): row for row in (RESULT or {})["rows"]}
    return [rows[shape, contender, 1024][name] for shape in ("bert", "llama")]


def rates(method: str, *tasks: str) -> list[float]:
    """The best learning rates in the comparison, ascending."""
    return sorted({best_rate(task, method) for task in tasks})


def rate(task: str, method: str) -> float:
    return frontier(task)[method].lr


def lower(difference: list[float]) -> list[float]:
    """By how much a loss is lower, and its interval, from a difference and that."""
    mean, low, high = difference
    return [-mean, -high, -low]


def few_tokens() -> list[float]:
    """The least and the greatest of the default's times to LoRA's, with few tokens at both shapes."""
    found = [each for shape in SHAPES for each in readings(shape)]
    return [min(found), max(found)]


CLAIMS = [
    Claim(
        README,
        "a step keeps [{:.2f} and {:.2f}]",
        lambda: [memory_to_lora(shape, "sparsegrad", "kept", LEAN) for shape in SHAPES],
    ),
    Claim(
        README,
        "and [{:.2f}](docs/results/sparsegrad.md#step-time-and-memory) on mpnet",
        lambda: [on_mpnet("kept_memory")],
    ),
    *(
        Claim(README, words, lambda: [*few_tokens(), *many("sparsegrad")])
        for words in (
            "in {:.2f} to {:.2f} of its time on a CPU, and {:.2f} and {:.2f} with 4,096 tokens",
            "| {:.2f} to {:.2f} times LoRA's on a CPU in four readings with up to 1,024 tokens, "
            "{:.2f} and {:.2f} with 4,096",
        )
    ),
    Claim(
        README,
        "columns {:.2f} and {:.2f} with few",
        lambda: [time_to_lora(shape, "columns", LEAN) for shape in SHAPES],
    ),
    Claim(README, "**ahead**: {:.2f} to {:.2f} of what LoRA", lambda: of_columns("kept_bytes")),
    Claim(README, "pass, {:.2f} to {:.2f} of its peak", lambda: of_columns("peak_bytes")),
    Claim(README, "The base model is at {:.3f}", lambda: [loss("frozen")]),
    Claim(
        README,
        "loss of the base {:.3f}, full fine-tuning of the same layers {:.3f}, LoRA r=8 {:.3f} | "
        "**level** with LoRA: the default after a warm-up of 8 {:.3f}, columns {:.3f}, an earlier default {:.3f}",
        lambda: map(loss, ("frozen", "full", "LoRA r=8", EIGHT, COLUMNS, NARROW)),
    ),
    Claim(
        README,
        "{:.1f} by the paper's method, {:.1f} by an earlier default, {:.1f} by LoRA",
        lambda: [statistics.fmean(scores("frozen", method)[1]) for method in ("paper", NARROWER_SIDES, "lora")],
    ),
    Claim(
        README,
        "CoLA with the rest of the model trained, {:.1f} by the paper's, {:.1f} by the default, {:.1f} by LoRA: "
        "**level**",
        lambda: [
            statistics.fmean(scores("trained", method, PUBLISHED_COLA)[1])
            for method in ("paper", "sparsegrad", "lora")
        ],
    ),
    Claim(
        README,
        "| at {:.3f}, columns {:.3f}, LoRA r=8 at its best rate {:.3f}",
        lambda: map(loss_of_short_runs, (DEFAULT, COLUMNS, "LoRA r=8")),
    ),
    Claim(
        README,
        "the loss on text of another kind is lower by {:.3f} ({:.3f} to {:.3f})",
        lambda: lower(elsewhere_to_lora(DEFAULT)),
    ),
    *(
        Claim(README, words, lambda: [*lower(to(LORA, DEFAULT, ON_CPU)), *lower(elsewhere_to_lora(DEFAULT, ON_CPU))])
        for words in (
            "{:.3f} ({:.3f} to {:.3f}) of loss on the answers and {:.3f} ({:.3f} to {:.3f}) on text of another kind",
            "on one CPU: by {:.4f} ({:.4f} to {:.4f}), on other text by {:.4f} ({:.4f} to {:.4f})",
        )
    ),
    Claim(README, "an earlier default at {:.3f} is behind", lambda: [loss_of_short_runs(NARROW)]),
    Claim(
        README,
        "it was {:.1f} on SmolLM2 and {:.1f} on mpnet, and with the 8 passes of most runs below {:.1f} on SmolLM2",
        lambda: [worth(DEFAULT)[1], cost_on_mpnet(DEFAULT)["warmup_worth"], worth(EIGHT)[0]],
    ),
    Claim(README, "same rate, {:g} ruined", lambda: ruined_by_rate("frozen", NARROWER_SIDES)),
    Claim(README, "lost {:.3f} of loss on SmolLM2", lambda: [lost_at_a_quarter()]),
    Claim(
        README,
        "{:.1f} seconds at BERT base's shape and {:.1f} at LLaMA 1B's, the first loading of kernels included, "
        "which was the time of {:.0f} and {:.0f} steps",
        lambda: [value for name in ("warmup_seconds", "warmup_in_steps") for value in warmup(NARROWER, name)],
    ),
    Claim(README, '`basis="columns"` of {:.0f} and {:.0f}.', lambda: warmup(WIDER_COLUMNS, "warmup_in_steps")),
    Claim(
        README,
        "{:.2f} and {:.2f} times with 1,024 tokens, {:.2f} and {:.2f} with 4,096",
        lambda: [to_lora(NARROWER, "least_ms", *batch) for batch in sorted(BATCHES, key=lambda batch: batch[1])],
    ),
    Claim(README, "| {:g} | {:g} |", lambda: [*rates("sparsegrad", STORIES), *rates("lora", STORIES)]),
    Claim(README, "| {:g} and {:g} | {:g} |", lambda: [*rates("sparsegrad", STSB, COLA), *rates("lora", STSB, COLA)]),
    Claim(
        README,
        "| mpnet, 110M, as a classifier (an earlier default) | {:g}, {:g}, {:g} | {:g} |",
        lambda: [
            *sorted([*(rate(task, NARROW) for task in ("stsb", "cola")), scores("frozen", NARROWER_SIDES)[0]]),
            *{rate(task, "LoRA r=8") for task in ("stsb", "cola")},
        ],
    ),
    Claim(
        README,
        "| SmolLM2, 135M, chat | {:g} and {:g} | {:g}, with 60 short passes {:g} |",
        lambda: [
            runs(DEFAULT, ON_CPU)[0]["run"]["lr"],
            *(rate("smollm2", method) for method in (NARROW, LORA)),
            rate_of_short_runs(LORA),
        ],
    ),
]
GIVEN = [
    Given(README, "At LoRA's rate, 0.0004, today's", "setting"),
    Given(README, "SmolLM2's conversations, at 0.0004", "setting"),
    Given(README, "trains about 1% of each", "setting"),
    Given(README, "begin with 0.001, and search", "setting"),
    Given(README, "3.10 or later", "pyproject.toml"),
    Given(README, "with 95% intervals", "setting"),
    Given(README, "By 95% intervals", "setting"),
    *(Given(README, words, "setting") for words in ("with 1,024 tokens", "with up to 1,024 tokens", "with 4,096")),
    Given(README, "LLaMA of 0.26M parameters", "setting"),
    Given(README, "SmolLM2, 60 short passes", "setting"),
]
