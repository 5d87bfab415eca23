"""Markdown tables of the results: means over seeds, with sample standard deviations."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .runs import SHARED_FIELDS, Record, Run, read
from .tasks import TASKS

Results = dict[Run, Record]


def tables(paths: Sequence[Path], against: str | None = None) -> str:
    """For each setting in the files, the final figures and the metric after each epoch.

    A run that is in several files counts once. Raises InputError if a file cannot be read.

    Args:
        paths: What `run` wrote.
        against: A method. If given, there is a table of the differences to it, seed by seed.
    """
    results: Results = {}
    for path in paths:
        results.update(read(path))
    groups = group_by(results, lambda run: [getattr(run, name) for name in SHARED_FIELDS])
    return "\n\n".join(
        f"{caption(group)}\n\n{final_table(group)}\n\nMetric along training:\n\n{epoch_table(group)}"
        + (f"\n\nDifference to {against}, seed by seed:\n\n{difference_table(group, against)}" if against else "")
        for group in groups
    )


def caption(results: Results) -> str:
    """What the runs of a table have in common, and what the metrics are."""
    run = next(iter(results))
    metrics = "; ".join(f"{name}: {TASKS[name].metric}" for name in sorted({run.task for run in results}))
    return (
        f"{run.model}: training rows {run.train_rows}, epochs {run.epochs}, batch size {run.batch_size}, density "
        f"{run.density:g}. Mean ± sample standard deviation over seeds, on the dev file ({metrics})."
    )


def final_table(results: Results) -> str:
    """One row for each task, method and learning rate: the figures at the end of training."""
    header = ["metric", "dev loss", "trained values", "of the head", "adapter bytes", "seconds per step"]
    return _table(header, results, _final_cells)


def epoch_table(results: Results) -> str:
    """One row for each task, method and learning rate: the dev metric after each epoch."""
    steps = next(iter(results)).eval_steps
    return _table([f"step {step}" for step in steps], results, _epoch_cells)


def difference_table(results: Results, against: str) -> str:
    """One row for each task, method and learning rate: what the last epoch's scores are above those of `against`.

    Only seeds that both have count. Metrics are better where the difference is above 0, losses where it is below.
    """

    def cells(records: list[Record]) -> list[str]:
        pairs = [(own, other) for own in records if (other := counterpart(own)) is not None]
        return [str(len(pairs)), *(_paired(pairs, score) for score in ("metric", "loss"))]

    def counterpart(record: Record) -> Record | None:
        return results.get(Run(**{**record["run"], "method": against}))

    others = {run: record for run, record in results.items() if run.method != against}
    return _table(["in both", "metric", "dev loss"], others, cells)


def _paired(pairs: list[tuple[Record, Record]], score: str) -> str:
    differences = [own["evaluations"][-1][score] - other["evaluations"][-1][score] for own, other in pairs]
    return mean_and_deviation(differences) if differences else ""


def mean_and_deviation(values: Sequence[float]) -> str:
    """`mean ± sample standard deviation`, or the value where there is one only."""
    mean = f"{statistics.fmean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def group_by(results: Results, key: Callable[[Run], Any]) -> list[Results]:
    """The results whose runs have the same key, by ascending key."""
    groups: dict[Any, Results] = {}
    for run, record in results.items():
        groups.setdefault(tuple(key(run)), {})[run] = record
    return [groups[each] for each in sorted(groups)]


def _table(header: Sequence[str], results: Results, cells: Callable[[list[Record]], Iterable[str]]) -> str:
    lines = [["task", "method", "learning rate", "seeds", *header]]
    lines.append(["---", "---", *["---:"] * (len(lines[0]) - 2)])
    for group in group_by(results, lambda run: (run.task, run.label, run.lr)):
        run = next(iter(group))
        lines.append([run.task, run.label, f"{run.lr:g}", str(len(group)), *cells(list(group.values()))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _final_cells(records: list[Record]) -> list[str]:
    last = [record["evaluations"][-1] for record in records]
    counts = [records[0][name] for name in ("trained_parameters", "trained_head_parameters", "adapter_bytes")]
    return [
        mean_and_deviation([scores["metric"] for scores in last]),
        mean_and_deviation([scores["loss"] for scores in last]),
        *(f"{count:,}" for count in counts),
        f"{statistics.median(record['seconds_per_step'] for record in records):.3f}",
    ]


def _epoch_cells(records: list[Record]) -> list[str]:
    by_epoch = zip(*(record["evaluations"] for record in records), strict=True)
    return [mean_and_deviation([scores["metric"] for scores in epoch]) for epoch in by_epoch]
