"""Mean grades per turn, per category, and in all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from experiments.json_files import Record
from experiments.terminal import heading, show, show_table

from .questions import Question


def group_scores(records: Iterable[Record], questions: Iterable[Question]) -> dict[str, list[float | None]]:
    """The scores of each turn, of each category and of all, by the group's name; None where there was no rating."""
    categories = {question.question_id: question.category for question in questions}
    turns, by_category, total = defaultdict(list), defaultdict(list), []
    for record in records:
        score = record["score"]
        turns[f"turn {record['turn']}"].append(score)
        by_category[categories[record["question_id"]]].append(score)
        total.append(score)
    return {**dict(sorted(turns.items())), **dict(sorted(by_category.items())), "all": total}


def show_scores(records: list[Record], questions: list[Question]) -> None:
    """Print the means. A judgment without a rating counts in none of them and is reported."""
    heading("mean score, 1 to 10")
    rows = []
    for name, scores in group_scores(records, questions).items():
        given = [score for score in scores if score is not None]
        rows.append((name, [f"{sum(given) / len(given):.2f}" if given else "none", f"{len(given)} judgments"]))
    show_table(rows)
    show("without a rating", str(sum(record["score"] is None for record in records)))
