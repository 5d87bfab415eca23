"""Markdown tables of the results: means over seeds, with sample standard deviations."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from experiments.json_files import Record
from experiments.tables import markdown_table

from .difference import difference_rows, reference
from .selection import RULE, Results, Series, final, load, series_of
from .tasks import TASKS

NOTHING = "–"
RATES = "Dev loss at every learning rate, seeds in brackets, the best rate in bold:"
DIFFERENCE = (
    "Difference to {}, seed by seed, each method at its own best learning rate: mean, and Student's 95% interval in "
    "brackets, for each comparison by itself. `better` and `worse` where the interval excludes 0, `level` where not."
)


def tables(paths: Sequence[Path], against: str | None = None) -> str:
    """For each setting in the files, the methods at their best learning rates, and the dev losses at every rate.

    Args:
        paths: What `run` wrote.
        against: A method's label. If given, there is a table of the differences to it, seed by seed.

    Raises:
        InputError: If a file cannot be read or has no result, or none is of `against`.
    """
    groups = load(paths)
    if against:
        reference(groups, against)
    return "\n\n".join(part for results in groups for part in _parts(results, against))


def _parts(results: Results, against: str | None) -> list[str]:
    series = series_of(results)
    parts = [caption(results), comparison_table(series), RATES]
    for task in sorted({each.task for each in series}):
        parts.append(rate_table([each for each in series if each.task == task]))
    if against and (rows := difference_rows(series, against)):
        header = ["task", "method", "seeds in both", "dev loss", "by dev loss", "metric", "by metric"]
        parts += [DIFFERENCE.format(against), markdown_table(header, rows, labels=2)]
    return parts


def caption(results: Results) -> str:
    """Describe what the runs of a table have in common, and the metrics."""
    run = next(iter(results))
    return (
        f"{run.model}: training rows {run.train_rows}, epochs {run.epochs}, batch size {run.batch_size}, density "
        f"{run.density:g}, head steps {run.head_steps}, {run.precision}, dev rows {run.max_eval_rows or 'all'}. "
        f"Mean ± sample standard deviation over seeds, on the dev file ({_metrics(results)}). {RULE}."
    )


def _metrics(results: Results) -> str:
    tasks = [TASKS[name] for name in sorted({run.task for run in results})]
    return "; ".join(f"{t.name}: {t.metric}, {'higher' if t.higher_is_better else 'lower'} is better" for t in tasks)


def comparison_table(series: list[Series]) -> str:
    """One row for each task and method: the figures at the end of training, at the best learning rate."""
    header = ["task", "method", "learning rate", "seeds", "metric", "dev loss", "trained values", "of the head"]
    header += ["adapter bytes", "seconds per step", "kept MB", "peak MB"]
    rows = [[s.task, s.label, f"{s.best:g}", *_figures(list(s.records.values()))] for s in series]
    return markdown_table(header, rows, labels=2)


def rate_table(series: list[Series]) -> str:
    """One row for each task and method: the dev loss at every learning rate, and where the best one lies."""
    rates = sorted({rate for each in series for rate in each.rates})
    rows = [[s.task, s.label, *(_loss_at(s, rate) for rate in rates), position(s)] for s in series]
    return markdown_table(["task", "method", *(f"{rate:g}" for rate in rates), "best rate"], rows, labels=2)


def position(series: Series) -> str:
    """Where the best learning rate lies among those tried."""
    if len(series.rates) == 1:
        return "the only one"
    if series.best in (min(series.rates), max(series.rates)):
        return "at the edge"
    return "inside"


def mean_and_deviation(values: Sequence[float]) -> str:
    """`mean ± sample standard deviation`, or the value where there is one only."""
    mean = f"{statistics.fmean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def _figures(records: list[Record]) -> list[str]:
    counts = [records[0][name] for name in ("trained_parameters", "trained_head_parameters", "adapter_bytes")]
    return [
        str(len(records)),
        *(mean_and_deviation([final(record, score) for record in records]) for score in ("metric", "loss")),
        *(f"{count:,}" for count in counts),
        f"{statistics.median(record['seconds_per_step'] for record in records):.3f}",
        *(_megabytes(records, name) for name in ("kept_memory", "peak_memory")),
    ]


def _megabytes(records: list[Record], name: str) -> str:
    measured = [record[name] for record in records if record[name] is not None]
    return f"{statistics.median(measured) / 1e6:.1f}" if measured else NOTHING


def _loss_at(series: Series, rate: float) -> str:
    if rate not in series.rates:
        return NOTHING
    records = series.rates[rate]
    cell = f"{mean_and_deviation([final(record, 'loss') for record in records.values()])} ({len(records)})"
    return f"**{cell}**" if rate == series.best else cell
