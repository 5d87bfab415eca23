"""Made-up files of all tasks in the layout of the benchmark, and the runs that options stand for."""

from __future__ import annotations

import json
import random
from pathlib import Path

from examples.xglue import train
from examples.xglue.runs import Run
from examples.xglue.tasks import TASKS, Task

WORDS = ("red", "blue", "green", "tall", "small", "old", "new", "warm", "cold", "long", "dark", "soft", "loud", "calm")
LANGUAGES = ("en", "de")  # which all tasks have


def write_benchmark(folder: Path, rows: int = 8) -> None:
    """Training and dev files in English, test files in two languages."""
    rng = random.Random(0)
    for task in TASKS.values():
        files = [("train", "en", rows), ("dev", "en", 4), *(("test", language, 4) for language in LANGUAGES)]
        for split, language, count in files:
            path = folder / task.file(split, language)  # pyright: ignore
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(WRITERS[task.kind](rng, task, count, path), encoding="utf-8")


def sentence(rng: random.Random, words: int = 5) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def text_pairs(rng: random.Random, task: Task, count: int, path: Path) -> str:
    """Rows; two in succession have their first text in common, as the pages of a query do."""
    lines = ["\t".join(task.columns)] if path.suffix == ".tsv" else []
    for number in range(count):
        if number % 2 == 0:
            first = sentence(rng)
        given = {"id": str(number), "label": task.labels[number % len(task.labels)]}
        texts = iter([first, *(sentence(rng) for _ in task.columns[2:])])
        lines.append("\t".join(given.get(column) or next(texts) for column in task.columns))
    return "\n".join(lines) + "\n"


def tagged_sentences(rng: random.Random, task: Task, count: int, path: Path) -> str:
    sentences = [[f"{rng.choice(WORDS)} {rng.choice(task.labels)}" for _ in range(4)] for _ in range(count)]
    return "\n\n".join("\n".join(words) for words in sentences) + "\n"


def questions(rng: random.Random, task: Task, count: int, path: Path) -> str:
    paragraphs = []
    for number in range(count):
        context = sentence(rng, 30)
        answer = context.split(" ")[number % 30]
        answers = [{"text": answer, "answer_start": context.index(answer)}]
        paragraphs.append({"context": context, "qas": [{"id": str(number), "question": "which?", "answers": answers}]})
    return json.dumps({"data": [{"title": "", "paragraphs": paragraphs}]})


WRITERS = {"classification": text_pairs, "tagging": tagged_sentences, "question-answering": questions}


def runs_of(options: list[str], *more: str) -> list[Run]:
    return train.runs_of(train.parse_args([*options, *more]))
