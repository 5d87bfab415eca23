"""Labelled sentences for `classify.py`: reading them, and the table of predictions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experiments.text_files import read_table
from peft_sparsegrad.cli.errors import InputError


@dataclass
class Sentences:
    """Sentences and, where the file has them, their labels."""

    path: Path
    texts: list[str]
    labels: list[str] | None

    def label_ids(self, names: list[str]) -> list[int]:
        """The labels as positions in `names`."""
        if self.labels is None:
            raise InputError(f"{self.path} has no column `label`")
        if unknown := sorted(set(self.labels) - set(names)):
            raise InputError(
                f"{self.path} has the label {unknown[0]!r}, and the training file only {', '.join(names)}"
            )
        return [names.index(label) for label in self.labels]


def read_sentences(path: Path) -> Sentences:
    """Read a .csv or .tsv file with columns `sentence` and `label`, or CoLA's source, label, star, sentence."""
    rows = read_table(path)
    has_header = bool(rows) and "sentence" in rows[0][1]
    header, rows = (rows[0][1], rows[1:]) if has_header else (["source", "label", "star", "sentence"], rows)
    if not rows:
        raise InputError(f"{path} holds no sentences")
    for line, row in rows:
        if len(row) != len(header):
            raise InputError(f"{path}, line {line}: {len(row)} columns, not the {len(header)} of {', '.join(header)}")
    texts = [row[header.index("sentence")] for _, row in rows]
    return Sentences(path, texts, [row[header.index("label")] for _, row in rows] if "label" in header else None)


def write_predictions(path: Path, texts: list[str], names: list[str], logits: list[list[float]]) -> None:
    """A tab-separated table: the predicted label, a logit for each label, the sentence."""
    with path.open("w", encoding="utf-8") as file:
        file.write("\t".join(["label", *(f"logit {name}" for name in names), "sentence"]) + "\n")
        for text, row in zip(texts, logits, strict=True):
            cells = [names[row.index(max(row))], *(f"{logit:.9g}" for logit in row), " ".join(text.split())]
            file.write("\t".join(cells) + "\n")


def read_logits(path: Path) -> list[list[float]]:
    """The logits of a table of predictions; 9 digits give a float32 back exactly."""
    rows = path.read_text(encoding="utf-8").split("\n")[1:-1]
    return [[float(cell) for cell in row.split("\t")[1:-1]] for row in rows]
