"""MT-Bench's questions and the answers to them, in FastChat's file formats."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experiments.json_files import Record, parse_records, text_field, text_list

Turns = list[str]


@dataclass(frozen=True)
class Question:
    """A question of several turns; `reference` holds right answers to them, where there are such."""

    question_id: int | str
    category: str
    turns: Turns
    reference: Turns | None


def read_questions(path: Path) -> list[Question]:
    """The questions of a file; an InputError names the file and the line that is wrong."""
    return parse_records(path, _question, "`question_id`, `category` and `turns`, a list of strings")


def read_answers(path: Path) -> dict[int | str, Turns]:
    """Question id to the turns of its answer, of the file that generate.py or FastChat writes."""
    needs = "`question_id` and `choices` with `turns`"
    answers = parse_records(
        path, lambda record: (record["question_id"], text_list(record["choices"][0]["turns"])), needs
    )
    return dict(answers)


def conversation(turns: Turns, answers: Turns) -> list[dict[str, str]]:
    """The messages up to the turn that comes after `answers`."""
    messages = []
    for turn, answer in zip(turns, answers, strict=False):
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": turns[len(answers)]}]


def _question(record: Record) -> Question:
    if not isinstance(record["question_id"], (int, str)):
        raise TypeError("`question_id` is neither a number nor a string")
    reference = record.get("reference")
    return Question(
        record["question_id"],
        text_field(record, "category"),
        text_list(record["turns"]),
        None if reference is None else text_list(reference),
    )
