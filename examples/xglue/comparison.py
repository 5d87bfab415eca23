"""Figures over all tasks: the understanding score, and the paired t-test against a baseline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import t, ttest_rel

from .scores import EpochRule, TaskResults

ALPHA = 0.05
ROUNDING = 1e-9  # points by which equal differences come out unequal


@dataclass(frozen=True)
class PairedTest:
    """A two-sided t-test of the differences between a method and the baseline, paired by task.

    Attributes:
        tasks: How many there are.
        difference: The mean difference, in points.
        statistic: Student's t, the mean difference in units of its standard error; NaN if it has none.
        p_value: How likely a t that far from 0 is if the methods are level. Not corrected for the number of methods.
    """

    tasks: int
    difference: float
    statistic: float
    p_value: float

    @property
    def critical(self) -> float:
        """The t beyond which the p-value is below `ALPHA`."""
        return float(t.ppf(1 - ALPHA / 2, self.tasks - 1))


def understanding_scores(results: Mapping[str, TaskResults], method: str, rule: EpochRule) -> dict[int, float]:
    """For each seed the mean over the tasks of the mean over their languages (XGLUE's average; table X of the paper).

    Only seeds with all tasks have one: a mean over fewer tasks is of another kind.
    """
    averages = [each.average(method, rule) if method in each.epochs else {} for each in results.values()]
    seeds = set.intersection(*(set(average) for average in averages))
    return {seed: statistics.fmean(average[seed] for average in averages) for seed in sorted(seeds)}


def gains(results: TaskResults, method: str, baseline: str, rule: EpochRule) -> dict[str, float]:
    """Return the points of a method above the baseline in each language, the mean over the seeds that both have."""
    own, other = _paired_means(results, method, baseline, rule)
    return {language: own[language] - other[language] for language in own}


def fractional_gains(results: TaskResults, method: str, baseline: str, rule: EpochRule) -> dict[str, float]:
    """Return the gain in each language in percent of the baseline's score; NaN where that is 0."""
    own, other = _paired_means(results, method, baseline, rule)
    return {language: 100 * (own[language] / other[language] - 1) if other[language] else math.nan for language in own}


def _paired_means(
    results: TaskResults, method: str, baseline: str, rule: EpochRule
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the scores of both in each language, the means over the seeds that both have; empty if there are none."""
    both = [results.of_languages(name, rule) for name in (method, baseline)]
    seeds = sorted(set(both[0]).intersection(both[1]))
    languages = results.languages if seeds else ()
    own, other = ({lang: statistics.fmean(each[s][lang] for s in seeds) for lang in languages} for each in both)
    return own, other


def paired_test(results: Mapping[str, TaskResults], method: str, baseline: str, rule: EpochRule) -> PairedTest | None:
    """The test over the tasks that both have; None if there are not two.

    A task's value is the mean over languages and over the seeds that both have (the paper's figure 3).
    """
    tasks = [gains(each, method, baseline, rule) for each in results.values() if method in each.epochs]
    differences = np.array([statistics.fmean(task.values()) for task in tasks if task])
    if len(differences) < 2:
        return None
    if np.ptp(differences) < ROUNDING:
        return PairedTest(len(differences), float(differences[0]), float("nan"), float("nan"))
    test = ttest_rel(differences, np.zeros_like(differences))
    return PairedTest(len(differences), float(differences.mean()), float(test.statistic), float(test.pvalue))
