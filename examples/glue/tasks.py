"""The nine tasks of GLUE (Wang et al. 2019, arXiv 1804.07461): columns, labels, metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from .metrics import score_accuracy, score_accuracy_and_f1, score_correlations, score_matthews

ENTAILMENT = ("entailment", "not_entailment")


@dataclass(frozen=True)
class Task:
    """A task of GLUE.

    Attributes:
        name: Key in `TASKS`, and the configuration of the hub's dataset `nyu-mll/glue`.
        title: Name in the paper's tables.
        folder: Name of its folder in GLUE's own archive.
        columns: Names of the one or two columns of sentences, as on the hub.
        labels: Names of the classes in the hub's order; none where the label is a number from 0 to 5.
        score: Called with predictions (rows, outputs) and labels (rows,); returns its metrics, among them "score".
        aliases: What a column is called in GLUE's own files, and its name here.
        headerless: Columns of a file that has no header; none if a file of this task must have one.
        dev_split: Name of the split that is scored, on the hub.
    """

    name: str
    title: str
    folder: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    score: Callable[[np.ndarray, np.ndarray], dict[str, float]] = score_accuracy
    aliases: Mapping[str, str] = field(default_factory=dict)
    headerless: tuple[str, ...] = ()
    dev_split: str = "validation"

    @property
    def is_regression(self) -> bool:
        return not self.labels

    @property
    def num_outputs(self) -> int:
        """Outputs of the task head."""
        return len(self.labels) or 1


# In the order of the paper's tables.
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="stsb",
            title="STSB",
            folder="STS-B",
            columns=("sentence1", "sentence2"),
            labels=(),
            score=score_correlations,
            aliases={"score": "label"},
            headerless=("sentence1", "sentence2", "label"),
        ),
        Task(
            name="cola",
            title="CoLA",
            folder="CoLA",
            columns=("sentence",),
            labels=("unacceptable", "acceptable"),
            score=score_matthews,
            headerless=("source", "label", "star", "sentence"),
        ),
        Task(
            name="mnli",
            title="MNLI",
            folder="MNLI",
            columns=("premise", "hypothesis"),
            labels=("entailment", "neutral", "contradiction"),
            aliases={"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"},
            dev_split="validation_matched",
        ),
        Task(
            name="mrpc",
            title="MRPC",
            folder="MRPC",
            columns=("sentence1", "sentence2"),
            labels=("not_equivalent", "equivalent"),
            score=score_accuracy_and_f1,
            aliases={"#1 String": "sentence1", "#2 String": "sentence2", "Quality": "label"},
        ),
        Task("qnli", "QNLI", "QNLI", ("question", "sentence"), ENTAILMENT),
        Task(
            name="qqp",
            title="QQP",
            folder="QQP",
            columns=("question1", "question2"),
            labels=("not_duplicate", "duplicate"),
            score=score_accuracy_and_f1,
            aliases={"is_duplicate": "label"},
        ),
        Task("rte", "RTE", "RTE", ("sentence1", "sentence2"), ENTAILMENT),
        Task("sst2", "SST2", "SST-2", ("sentence",), ("negative", "positive")),
        Task("wnli", "WNLI", "WNLI", ("sentence1", "sentence2"), ENTAILMENT[::-1]),
    )
}
PAPER_TASKS = [name for name in TASKS if name != "wnli"]
