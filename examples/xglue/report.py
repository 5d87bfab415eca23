"""Make tables and figures of the results of `examples.xglue.train`.

    python -m examples.xglue.report outputs/xglue/results.jsonl --out outputs/xglue/report

Writes `report.md` with a table over all tasks and the understanding score, a paired t-test over the tasks against the
baseline, and for each task a table of its languages; and as PNG for each task the score per epoch and the gain per
language, and the t statistics. Results of several machines can be given together.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from experiments.methods import METHODS
from experiments.terminal import run_and_exit
from experiments.text_files import make_folder, write_whole

from .comparison import PairedTest, paired_test
from .figures import epoch_figure, gain_figure, t_figure
from .runs import FINE_TUNING
from .scores import EpochRule, TaskResults, load_results, methods_of
from .tables import language_table, significance_table, task_table

RULES = {"last": "the last epoch", "best-dev": "the epoch with the best score on the English dev set"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    args = parse_args(arguments)
    results = load_results(args.results, args.baseline)
    make_folder(args.out)
    figures = draw(results, args.baseline, args.epoch)
    for name, content in figures.items():
        write_whole(args.out / name, content)
    text = report(results, args.baseline, args.epoch, list(figures))
    write_whole(args.out / "report.md", text.encode())
    for name in ("report.md", *figures):
        print(args.out / name)
    return 0


def draw(results: dict[str, TaskResults], baseline: str, rule: EpochRule) -> dict[str, bytes]:
    """All figures that the results allow, by the names of their files."""
    tests = paired_tests(results, baseline, rule)
    drawn = {"t-test.png": t_figure(tests, baseline) if tests else None}
    for name, each in results.items():
        drawn[f"epochs-{name}.png"] = epoch_figure(each)
        drawn[f"gain-{name}.png"] = gain_figure(each, baseline, rule)
    return {name: content for name, content in drawn.items() if content is not None}


def paired_tests(results: dict[str, TaskResults], baseline: str, rule: EpochRule) -> dict[str, PairedTest]:
    """The paired t-tests that have a t."""
    tests = {
        method: paired_test(results, method, baseline, rule)
        for method in methods_of(results, baseline)
        if method != baseline
    }
    return {method: test for method, test in tests.items() if test is not None and not math.isnan(test.statistic)}


def report(results: dict[str, TaskResults], baseline: str, rule: EpochRule, figures: list[str]) -> str:
    """The Markdown text, with links to the figures beside it."""
    parts = [
        "# XGLUE: trained on English, tested on every language",
        f"Scores are percentages after {RULES[rule]}: mean ± sample standard deviation over the seeds, the best mean "
        "of a column in bold. The score of a task is the mean over its languages.",
        task_table(results, baseline, rule),
        f"## Paired t-test against {baseline}, over tasks",
        "Two-sided; a task's value is the mean over its languages and over the seeds that both methods have. The "
        "p-values are not corrected for the number of methods.",
        significance_table(results, baseline, rule),
        *_links(figures, "t-test.png"),
    ]
    for name, each in results.items():
        parts += [f"## {name}", _conditions(each), language_table(each, rule)]
        parts += _links(figures, f"epochs-{name}.png", f"gain-{name}.png")
    return "\n\n".join(parts) + "\n"


def _links(figures: list[str], *names: str) -> list[str]:
    return [f"![{Path(name).stem}]({name})" for name in names if name in figures]


def _conditions(results: TaskResults) -> str:
    run = results.runs[0]
    rates = sorted({each.lr for each in results.runs})
    return (
        f"{results.task.metric} in percent on the {run.split} sets. {run.model}, {run.epochs} epochs, batch size "
        f"{run.batch_size}, learning rate {' and '.join(f'{rate:g}' for rate in rates)}, {run.max_length} tokens, "
        f"{f'the first {run.max_rows} rows' if run.max_rows else 'all rows'} of each file, embeddings "
        f"{run.embeddings}, {run.precision}."
    )


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.xglue.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("results", type=Path, nargs="+", metavar="FILE", help="results.jsonl of examples.xglue.train (required)")
    add("--out", type=Path, default=Path("outputs/xglue/report"), help="folder for the report (%(default)s)")
    add(
        "--baseline",
        choices=list(METHODS),
        default=FINE_TUNING,
        metavar="METHOD",
        help="method that the others are compared with (%(default)s, which is plain fine-tuning)",
    )
    add(
        "--epoch",
        choices=list(RULES),
        default="last",
        help="whose scores count: the last, or the one with the best score on the English dev set (%(default)s)",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_and_exit(main)
