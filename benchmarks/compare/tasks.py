"""The table of tasks."""

from __future__ import annotations

from .labelled import LabelledTask, parse_cola, parse_stsb
from .language import LanguageTask
from .scores import score_classes, score_numbers, score_tokens
from .task import Task

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        LabelledTask(
            name="cola",
            metric="Matthews correlation",
            loss="cross entropy, nats",
            file="cola/cola_{}.tsv",
            score=score_classes,
            parse=parse_cola,
            num_labels=2,
            problem_type="single_label_classification",
        ),
        LabelledTask(
            name="stsb",
            metric="mean of Pearson and Spearman correlation",
            loss="mean squared error, points²",
            file="stsb/stsb_{}.csv",
            score=score_numbers,
            parse=parse_stsb,
            num_labels=1,
            problem_type="regression",
        ),
        LanguageTask(
            name="instructions",
            metric="perplexity",
            loss="cross entropy, nats per token",
            file="seed_tasks.jsonl",
            score=score_tokens,
        ),
    )
}
