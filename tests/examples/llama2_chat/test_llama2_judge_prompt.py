"""What the judge is shown, how its rating is read, and how ratings are summed up."""

from __future__ import annotations

import pytest

from examples.llama2_chat.judge_prompt import build_prompt, parse_rating
from examples.llama2_chat.questions import Question
from examples.llama2_chat.scores import group_scores


@pytest.mark.parametrize(
    ("judgment", "rating"),
    [
        ("Rating: [[7]]", 7), ("[[ 10 ]]", 10), ("Rating: [[7.5]]", 7.5), ("At first [[3]], but Rating: [[8]]", 8),
        ("Rating: 7", None), ("[[0]]", None), ("[[11]]", None), ("[[seven]]", None), ("", None),
    ],
)  # fmt: skip
def test_rating(judgment, rating):
    assert parse_rating(judgment) == rating


def test_second_turn_shows_the_first_and_its_own_reference_alone():
    question = Question(1, "math", ["Q1?", "Q2?"], ["R1.", "R2."])
    (system, first), (_, second) = (build_prompt(question, ["A1.", "A2."], turn) for turn in (0, 1))
    assert "reference" in system
    assert [word in first for word in ("Q1?", "A1.", "R1.", "Q2?", "A2.", "R2.")] == [True] * 3 + [False] * 3
    assert [word in second for word in ("Q1?", "A1.", "R1.", "Q2?", "A2.", "R2.")] == [True] * 2 + [False] + [True] * 3
    assert "reference" not in build_prompt(Question(1, "math", ["Q1?"], None), ["A1."], 0)[0].lower()


def test_nulls_are_kept_apart_from_scores():
    asked = [Question(i, "math" if i else "writing", ["a"], None) for i in range(3)]
    records = [{"question_id": i, "turn": 1, "score": score} for i, score in enumerate([None, 4, 6])]
    assert group_scores(records, asked) == {
        "turn 1": [None, 4, 6], "math": [4, 6], "writing": [None], "all": [None, 4, 6],
    }  # fmt: skip
