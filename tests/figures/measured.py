"""Figures out of the results files in docs/results."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.compare.difference import interval, verdict
from benchmarks.compare.selection import Series, final, load, series_of
from benchmarks.compare.tasks import TASKS

RESULTS = Path(__file__).parents[2] / "docs/results"
STORIES, STSB, COLA = "instructions", "stsb", "cola"


@cache
def all_series(file: str) -> dict[tuple[str, str], Series]:
    """All series of a `.jsonl` file, by task and label."""
    groups = load([RESULTS / f"{file}.jsonl"])
    return {(series.task, series.label): series for results in groups for series in series_of(results)}


def scores(task: str, label: str, score: str = "loss", file: str = "comparison") -> dict[int, float]:
    """The score at the end of the runs at the best learning rate, by seed."""
    return {seed: final(record, score) for seed, record in all_series(file)[task, label].records.items()}


def scores_at(rate: float, task: str, label: str, score: str, file: str) -> dict[int, float]:
    """The score at the end of the runs at a learning rate, by seed."""
    return {seed: final(record, score) for seed, record in all_series(file)[task, label].rates[rate].items()}


def mean(task: str, label: str, score: str = "loss", file: str = "comparison") -> float:
    """Mean over the seeds."""
    return fmean(scores(task, label, score, file).values())


def mean_sd(task: str, label: str, score: str = "loss", file: str = "comparison") -> tuple[float, float]:
    """Mean over the seeds, and sample standard deviation."""
    values = list(scores(task, label, score, file).values())
    return fmean(values), stdev(values)


def differences(task: str, label: str, other: str, score: str = "loss", file: str = "comparison") -> dict[int, float]:
    """A method's score less another's, by seed, where both have one."""
    own, others = scores(task, label, score, file), scores(task, other, score, file)
    return {seed: own[seed] - others[seed] for seed in own if seed in others}


def lead(task: str, label: str, other: str, file: str = "comparison") -> tuple[float, float, float]:
    """The loss that a method has less than another, seed by seed: mean, and 95% interval from low to high."""
    ahead = [-each for each in differences(task, label, other, file=file).values()]
    return fmean(ahead), *interval(ahead)


def seeds_ahead(task: str, label: str, other: str, file: str = "comparison") -> str:
    """In how many seeds a method has less loss than another: `3 of 3`."""
    found = list(differences(task, label, other, file=file).values())
    return f"{sum(each < 0 for each in found)} of {len(found)}"


def recorded(task: str, label: str, name: str, file: str = "comparison") -> Any:
    """A field of the first record at the best learning rate."""
    return next(iter(all_series(file)[task, label].records.values()))[name]


def best_rate(task: str, label: str, file: str = "comparison") -> float:
    """The best learning rate."""
    return all_series(file)[task, label].best


@cache
def bench(file: str = "bench") -> dict[str, Any]:
    """What `python -m benchmarks` has written to a `.json` file."""
    return json.loads((RESULTS / f"{file}.json").read_text("utf-8"))


def step(shape: str, contender: str, file: str = "bench", batch: str = "full batch") -> dict[str, Any]:
    """What was measured of a contender's training step."""
    return bench(file)["step"][shape][batch][contender]


def time_to_lora(shape: str, contender: str, file: str = "bench", batch: str = "full batch") -> float:
    """Median of a step's time as a ratio to LoRA's of the same round."""
    return step(shape, contender, file, batch)["to_lora"]["median"]


def memory_to_lora(shape: str, contender: str, kind: str, file: str = "bench") -> float:
    """The `kept` or `peak` bytes of a step as a ratio to LoRA's."""
    return step(shape, contender, file)[f"{kind}_bytes"] / step(shape, "lora", file)[f"{kind}_bytes"]


def graddrop(shape: str, contender: str) -> dict[str, Any]:
    """What was measured of a step of GradDrop."""
    return bench("graddrop_bench")["graddrop"][shape][contender]


def standing(task: str, label: str, other: str, score: str = "loss", file: str = "comparison") -> str:
    """Where a method stands to another by the 95% interval: `ahead`, `level` or `behind`."""
    bounds = interval(list(differences(task, label, other, score, file).values()))
    better = verdict(*bounds, score == "metric" and TASKS[task].higher_is_better)
    return {"better": "ahead", "worse": "behind"}.get(better, better)


def file_to_lora(task: str, label: str) -> float:
    """Bytes of the adapter file without those of the task head, as a ratio to LoRA's."""
    sizes = [
        recorded(task, each, "adapter_bytes") - 4 * recorded(task, each, "trained_head_parameters")
        for each in (label, "lora")
    ]
    return sizes[0] / sizes[1]
