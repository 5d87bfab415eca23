"""Differences between two methods, paired by seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.stats

from peft_sparsegrad.cli.errors import InputError

from .selection import Results, Series, final
from .tasks import TASKS

CONFIDENCE = 0.95


def reference(groups: Sequence[Results], label: str) -> None:
    """Raises InputError if no result is of the method that the others are to be compared with."""
    labels = sorted({run.label for results in groups for run in results})
    if label not in labels:
        raise InputError(f"no result is of {label!r}: there are {', '.join(map(repr, labels))}")


def difference_rows(series: list[Series], against: str) -> list[list[str]]:
    """For each series but the reference's: task, label, seeds in both, and two cells each for loss and metric."""
    references = {each.task: each for each in series if each.label == against}
    rows = []
    for own in series:
        other = references.get(own.task)
        if other is None or own is other:
            continue
        seeds = sorted(set(own.records).intersection(other.records))
        cells = [cell for score in ("loss", "metric") for cell in _cells(own, other, seeds, score)]
        rows.append([own.task, own.label, str(len(seeds)), *cells])
    return rows


def _cells(own: Series, other: Series, seeds: list[int], score: str) -> tuple[str, str]:
    differences = [final(own.records[seed], score) - final(other.records[seed], score) for seed in seeds]
    if not differences:
        return "–", "–"
    mean = float(np.mean(differences))
    if len(differences) == 1:
        return f"{mean:+.4f}", "one seed"
    low, high = interval(differences)
    higher_is_better = score == "metric" and TASKS[own.task].higher_is_better
    return f"{mean:+.4f} ({low:+.4f} to {high:+.4f})", verdict(low, high, higher_is_better)


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of Student's t for the mean of at least two differences."""
    mean, error = np.mean(differences), scipy.stats.sem(differences)
    if error == 0:
        return float(mean), float(mean)
    low, high = scipy.stats.t.interval(CONFIDENCE, len(differences) - 1, loc=mean, scale=error)
    return float(low), float(high)


def verdict(low: float, high: float, higher_is_better: bool) -> str:
    """`better` or `worse` where the interval excludes 0, `level` where it does not."""
    if low > 0 or high < 0:
        return "better" if (low > 0) == higher_is_better else "worse"
    return "level"
