"""Markdown tables of the scores: means over seeds with sample standard deviations."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from experiments.tables import markdown_table

from .comparison import PairedTest, paired_test, understanding_scores
from .scores import EpochRule, TaskResults, methods_of
from .tasks import XGLUE

NOTHING = "–"
Cell = Sequence[float]  # a value for each seed


def task_table(results: dict[str, TaskResults], baseline: str, rule: EpochRule) -> str:
    """Methods in rows; in columns the tasks, each averaged over its languages, and the understanding score."""
    rows = {}
    for method in methods_of(results, baseline):
        averages = [each.average(method, rule) if method in each.epochs else {} for each in results.values()]
        cells = [*averages, understanding_scores(results, method, rule)]
        rows[method] = [list(cell.values()) for cell in cells]
    header = [f"{name} ({each.task.metric})" for name, each in results.items()]
    return score_table([*header, overall_name(results)], rows)


def overall_name(results: Iterable[str]) -> str:
    """Return the name of the mean over the tasks: the understanding score is that of all nine."""
    names = list(results)
    return "understanding score" if set(names) == set(XGLUE) else f"mean over {', '.join(names)}"


def language_table(results: TaskResults, rule: EpochRule) -> str:
    """Methods in rows; in columns the languages, their mean, and the means of further metrics."""
    metric, rows = results.task.metric, {}
    first = next(iter(results.epochs))
    scores = next(iter(results.at(first, rule).values()))[results.languages[0]]
    others = [name for name in scores if name != metric]
    for method in results.epochs:
        by_seed = results.of_languages(method, rule).values()
        means = [results.average(method, rule, name) for name in (metric, *others)]
        rows[method] = [
            *([scores[language] for scores in by_seed] for language in results.languages),
            *(list(mean.values()) for mean in means),
        ]
    return score_table([*results.languages, "mean", *(f"mean {name}" for name in others)], rows)


def score_table(header: Sequence[str], rows: dict[str, list[Cell]]) -> str:
    """A Markdown table of `mean ± standard deviation`, with the highest mean of each column in bold."""
    best = [max((_mean(row[i]) for row in rows.values() if row[i]), default=None) for i in range(len(header))]
    lines = []
    for method, cells in rows.items():
        texts = [_cell(cell, highest) for cell, highest in zip(cells, best, strict=True)]
        lines.append([method, counts(len(cell) for cell in cells), *texts])
    return markdown_table(["method", "seeds", *header], lines)


def _mean(values: Cell) -> float:
    return round(statistics.fmean(values), 2)


def _cell(values: Cell, highest: float | None) -> str:
    if not values:
        return NOTHING
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    text = f"{_mean(values):.2f}{deviation}"
    return f"**{text}**" if _mean(values) == highest else text


def counts(numbers: Iterable[int]) -> str:
    """`3`, or `2 to 3` where the numbers differ."""
    distinct = sorted(set(numbers))
    return f"{distinct[0]}" if len(distinct) == 1 else f"{distinct[0]} to {distinct[-1]}"


def significance_table(results: dict[str, TaskResults], baseline: str, rule: EpochRule) -> str:
    """A paired t-test over the tasks for each method but the baseline."""
    methods = [method for method in methods_of(results, baseline) if method != baseline]
    rows = [[method, *_test_cells(paired_test(results, method, baseline, rule))] for method in methods]
    return markdown_table(["method", "tasks", "mean difference, points", "t", "p"], rows)


def _test_cells(test: PairedTest | None) -> list[str]:
    if test is None:
        return ["fewer than 2", *[NOTHING] * 3]
    if math.isnan(test.statistic):
        return [str(test.tasks), f"{test.difference:+.2f}", NOTHING, NOTHING]
    return [str(test.tasks), f"{test.difference:+.2f}", f"{test.statistic:+.2f}", p_value(test)]


def p_value(test: PairedTest) -> str:
    return "< 0.001" if test.p_value < 0.001 else f"{test.p_value:.3f}"
