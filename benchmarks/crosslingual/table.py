"""Markdown tables: scores by group of languages, differences to plain fine-tuning, and the search for the rates."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.compare.difference import interval, verdict
from examples.xglue.features import ENGLISH_DEV
from examples.xglue.runs import Run
from examples.xglue.tasks import TASKS
from experiments.tables import markdown_table

from .series import Results, Series, score, series_of

NOTHING = "–"
RATES = "Score on the English dev set at every learning rate of the search, seeds in brackets, the best rate in bold:"
DIFFERENCE = (
    "Difference to {}, in points, seed by seed, each method at its own best learning rate: mean, and Student's 95% "
    "interval in brackets, for each comparison by itself. `better` and `worse` where the interval excludes 0, `level` "
    "where not."
)


def tables(results: Results, baseline: str) -> str:
    """Return for each task what its runs have in common, and its tables; `baseline` is a method's label."""
    series = series_of(results)
    tasks = list(dict.fromkeys(each.task for each in series))
    runs = {run.task: run for run in results}
    return "\n\n".join(
        part for task in tasks for part in _parts(runs[task], [s for s in series if s.task == task], baseline)
    )


def _parts(run: Run, series: list[Series], baseline: str) -> list[str]:
    parts = [f"### {run.task}", caption(run, series[0]), score_table(series)]
    if rows := difference_rows(series, baseline):
        header = ["method", "seeds in both", *(cell for name in groups(series[0]) for cell in (name, "it is"))]
        parts += [DIFFERENCE.format(baseline), markdown_table(header, rows)]
    return [*parts, RATES, rate_table(series)]


def caption(run: Run, series: Series) -> str:
    """Describe what the runs of a table have in common."""
    low = f"; low-resource: {', '.join(series.low_resource)}" if series.low_resource else ""
    rows = f"at most the first {run.max_rows}" if run.max_rows else "all"
    return (
        f"{run.model.rstrip('/').rpartition('/')[2]}, trained in English, tested in {', '.join(run.languages)}{low}. "
        f"{TASKS[run.task].metric} in percent after {run.epochs} epochs, batch size {run.batch_size}, "
        f"{run.max_length} tokens, {rows} rows of each file, embeddings {run.embeddings}, {run.precision}. "
        "Mean ± sample standard deviation over seeds."
    )


def groups(series: Series) -> dict[str, tuple[str, ...]]:
    """Return the groups of languages whose mean is looked at."""
    named = {"English": ("en",), "all languages": series.languages, "low-resource": series.low_resource}
    return {name: languages for name, languages in named.items() if languages}


def score_table(series: list[Series]) -> str:
    """One row for each method: its best rate and its scores there."""
    header = ["method", "learning rate", "best rate", "seeds", *groups(series[0])]
    rows = []
    for each in series:
        means = [list(each.means(languages).values()) for languages in groups(each).values()]
        rows.append([each.label, f"{each.best:g}", position(each), str(len(means[0])), *map(_cell, means)])
    return markdown_table(header, rows)


def differences(own: Series, other: Series, languages: Sequence[str]) -> list[float]:
    """Return the points between two methods for each seed that both have, the mean over the languages."""
    mine, theirs = own.means(languages), other.means(languages)
    return [mine[seed] - theirs[seed] for seed in sorted(set(mine).intersection(theirs))]


def difference_rows(series: list[Series], baseline: str) -> list[list[str]]:
    """Return for each method but the baseline: its name, seeds in both, and two cells for each group of languages."""
    others = [each for each in series if each.label == baseline]
    rows = []
    for own in series:
        if others and own is not others[0]:
            by_group = [differences(own, others[0], languages) for languages in groups(own).values()]
            cells = [cell for values in by_group for cell in _difference_cells(values)]
            rows.append([own.label, str(len(by_group[0])), *cells])
    return rows


def _difference_cells(values: list[float]) -> tuple[str, str]:
    if not values:
        return NOTHING, NOTHING
    mean = f"{statistics.fmean(values):+.2f}"
    if len(values) == 1:
        return mean, "one seed"
    low, high = interval(values)
    return f"{mean} ({low:+.2f} to {high:+.2f})", verdict(low, high, higher_is_better=True)


def position(series: Series) -> str:
    """Where the best learning rate lies among those tried."""
    if len(series.rates) == 1:
        return "the only one"
    return "at the edge" if series.best in (min(series.rates), max(series.rates)) else "inside"


def rate_table(series: list[Series]) -> str:
    """One row for each method: the score on the English dev set at every rate, over the seeds that all rates have."""
    rates = sorted({rate for each in series for rate in each.rates})
    rows = [[each.label, *(_dev_cell(each, rate) for rate in rates)] for each in series]
    return markdown_table(["method", *(f"{rate:g}" for rate in rates)], rows)


def _dev_cell(series: Series, rate: float) -> str:
    if rate not in series.rates:
        return NOTHING
    seeds = set.intersection(*map(set, series.rates.values())) or set(series.rates[rate])
    values = [score(series.rates[rate][seed], series.task, ENGLISH_DEV) for seed in seeds]
    cell = f"{statistics.fmean(values):.2f} ({len(values)})"
    return f"**{cell}**" if rate == series.best else cell


def _cell(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"
