"""The question to the judge: a grade from 1 to 10 for one turn of one answer.

The protocol, single-answer grading, is that of Zheng et al., *Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena*
(2023, arXiv 2306.05685, section 3.1); the words are ours.
"""

from __future__ import annotations

import re

from .questions import Question, Turns

SYSTEM = """You grade the answers of an AI assistant. Judge how well the answer serves the user: whether it does what
was asked, whether what it says is true, and whether it is relevant, complete enough, and clear. Do not reward length,
and do not let style make up for errors. {reference}First explain your judgment in a few sentences. Then give a whole
number from 1 (useless) to 10 (excellent) in the last line, in exactly this form: Rating: [[5]]"""
USE_REFERENCE = "A right answer is given as a reference: compare with it, and call what contradicts it an error. "

TURN = """### User's question
{question}

### Assistant's answer
{answer}
"""
EARLIER = "The conversation before the answer that you grade is for context only.\n\n"
GRADED = "### The turn that you grade\n\n"
REFERENCE = "### Reference answer\n{reference}\n"

RATING = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")


def build_prompt(question: Question, answers: Turns, turn: int) -> tuple[str, str]:
    """The judge's system message and user message for `turn`, counted from 0."""
    reference = _reference(question, turn)
    shown = [TURN.format(question=q, answer=a) for q, a in zip(question.turns, answers, strict=True)]
    parts = [REFERENCE.format(reference=reference)] if reference else []
    if turn > 0:
        parts = [EARLIER, *shown[:turn], *parts, GRADED]
    return SYSTEM.format(reference=USE_REFERENCE if reference else ""), "\n".join([*parts, shown[turn]])


def template_name(question: Question, turn: int) -> str:
    """Return the name of the prompt for the records; FastChat writes it in the same place."""
    return "single" + "-reference" * bool(_reference(question, turn)) + "-multi-turn" * (turn > 0)


def parse_rating(judgment: str) -> float | None:
    """The last rating from 1 to 10 in double brackets; None where there is none."""
    ratings = [float(number) for number in RATING.findall(judgment)]
    return ratings[-1] if ratings and 1 <= ratings[-1] <= 10 else None


def _reference(question: Question, turn: int) -> str | None:
    """Questions without a right answer have none, and some have one for the first turn alone."""
    if question.reference is None or turn >= len(question.reference):
        return None
    return question.reference[turn]
