"""F1 and exact match of answers, as MLQA defines them for each language (Lewis et al., arXiv 1910.07475)."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

ARTICLES = {
    "ar": r"ال",  # wherever it stands, as in MLQA's own evaluation
    "de": r"\b(?:ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
    "en": r"\b(?:a|an|the)\b",
    "es": r"\b(?:un|una|unos|unas|el|la|los|las)\b",
    "vi": r"\b(?:của|là|cái|chiếc|những)\b",
}
CHINESE = re.compile("([\u4e00-\u9fa5])")


def answer_scores(predicted: Sequence[str], true: Sequence[Iterable[str]], language: str) -> dict[str, float]:
    """Mean F1 and share of exact matches over the questions, in percent; of several right answers the best counts.

    Args:
        predicted: An answer for each question.
        true: The right answers of each question.
    """
    pairs = list(zip(predicted, true, strict=True))

    def mean(score: Callable[[list[str], list[str]], float]) -> float:
        best = (max(score(words(p, language), words(t, language)) for t in answers) for p, answers in pairs)
        return 100 * sum(best) / len(pairs)

    return {"f1": mean(overlap_f1), "exact match": mean(lambda p, t: float(p == t))}


def words(answer: str, language: str) -> list[str]:
    """The words of an answer without case, punctuation and articles; in Chinese the characters."""
    text = "".join(character for character in answer.lower() if not is_punctuation(character))
    text = re.sub(ARTICLES.get(language, r"(?!)"), " ", text)
    if language == "zh":
        text = CHINESE.sub(r" \1 ", text)
    return text.split()


def is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def overlap_f1(predicted: list[str], true: list[str]) -> float:
    """Harmonic mean of the shares of predicted and of true words that the two have in common, in [0, 1]."""
    common = (Counter(predicted) & Counter(true)).total()
    return 2 * common / (len(predicted) + len(true)) if common else 0.0
