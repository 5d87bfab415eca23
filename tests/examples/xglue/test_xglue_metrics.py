"""The scores, against values worked out by hand and against slow definitions."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from examples.xglue.answers import answer_scores, words
from examples.xglue.metrics import accuracy, entity_f1, ndcg, query_groups, word_accuracy


def test_accuracy_is_in_percent():
    assert accuracy([0, 1, 1, 2], [0, 1, 2, 2]) == {"accuracy": 75.0}


def test_word_accuracy_counts_words_and_not_sentences():
    predicted = [["NOUN"], ["VERB", "VERB", "O"]]
    assert word_accuracy(predicted, [["NOUN"], ["VERB", "NOUN", "ADV"]]) == {"accuracy": 50.0}


def test_ndcg_by_hand():
    """Ratings 3, 2, 0 put in the order 2, 3, 0: gains are divided by log2 of the place plus one."""
    ideal = 3 + 2 / math.log2(3)
    reached = 2 + 3 / math.log2(3)
    assert ndcg([1, 4, 0], [3, 2, 0], ["q", "q", "q"])["ndcg"] == pytest.approx(100 * reached / ideal)


def test_ndcg_leaves_out_single_pages_and_ties_are_the_mean_of_their_orders():
    assert ndcg([0, 4, 0], [4, 4, 0], ["a", "b", "b"])["ndcg"] == pytest.approx(100)
    expected = (1 + 1 / math.log2(3)) / 2
    assert ndcg([2, 2], [4, 0], ["q", "q"])["ndcg"] == pytest.approx(100 * expected)


def slow_ndcg(predicted: list[int], gains: list[int]) -> float:
    """Mean over all orders that the predictions allow."""

    def discounted(order):
        return sum(gains[page] / math.log2(place + 2) for place, page in enumerate(order))

    orders = [
        order
        for order in itertools.permutations(range(len(gains)))
        if all(predicted[a] >= predicted[b] for a, b in itertools.pairwise(order))
    ]
    best = discounted(sorted(range(len(gains)), key=lambda page: -gains[page]))
    return sum(discounted(order) for order in orders) / len(orders) / best if best else 0.0


def test_ndcg_equals_the_slow_definition():
    rng = random.Random(0)
    predicted, true, queries, expected = [], [], [], []
    for query in range(30):
        pages = rng.randrange(2, 6)
        ratings, gains = ([rng.randrange(5) for _ in range(pages)] for _ in range(2))
        predicted, true, queries = predicted + ratings, true + gains, queries + [str(query)] * pages
        expected.append(slow_ndcg(ratings, gains))
    assert ndcg(predicted, true, queries)["ndcg"] == pytest.approx(100 * sum(expected) / len(expected))


def test_rows_of_a_query_are_those_in_succession():
    assert query_groups(["a", "a", "b", "a"]) == [[0, 1], [2], [3]]


def test_entity_f1_by_hand():
    """Of two true entities one is found whole; of three predicted ones it is the one that is right."""
    true = [["B-PER", "I-PER", "O", "B-LOC"]]
    predicted = [["B-PER", "I-PER", "B-ORG", "B-ORG"]]
    scores = entity_f1(predicted, true)
    assert scores == pytest.approx({"f1": 40.0, "precision": 100 / 3, "recall": 50.0})
    assert entity_f1([["O"] * 4], true)["f1"] == 0


def spans(labels: list[str]) -> set[tuple[str, int, int]]:
    """Entities in labels of which every one begins with B."""
    found, start = set(), None
    for i, label in enumerate([*labels, "O"]):
        if start is not None and label != f"I-{labels[start][2:]}":
            found.add((labels[start][2:], start, i))
            start = None
        if label.startswith("B-"):
            start = i
    return found


def test_entity_f1_equals_a_comparison_of_spans():
    rng = random.Random(0)

    def sentence() -> list[str]:
        labels: list[str] = []
        while len(labels) < 8:
            kind = rng.choice(["PER", "LOC"])
            labels += rng.choice([["O"], [f"B-{kind}"], [f"B-{kind}", f"I-{kind}"]])
        return labels[:8]

    predicted, true = ([sentence() for _ in range(40)] for _ in range(2))
    right = sum(len(spans(p) & spans(t)) for p, t in zip(predicted, true, strict=True))
    total = sum(len(spans(labels)) for labels in predicted + true)
    assert entity_f1(predicted, true)["f1"] == pytest.approx(100 * 2 * right / total)


@pytest.mark.parametrize(
    ("language", "answer", "expected"),
    [
        ("en", "The Red, red house!", ["red", "red", "house"]),
        ("de", "Das Haus der Anna", ["haus", "anna"]),
        ("es", "La casa, un día", ["casa", "día"]),
        ("vi", "những con mèo", ["con", "mèo"]),
        ("ar", "الكتاب", ["كتاب"]),
        ("hi", "एक किताब।", ["एक", "किताब"]),
        ("zh", "北京 2008年。", ["北", "京", "2008", "年"]),
        ("en", "another theme", ["another", "theme"]),  # an article is a word of its own
    ],
)
def test_answers_are_compared_without_case_punctuation_and_articles(language, answer, expected):
    assert words(answer, language) == expected


def test_answer_scores_take_the_best_of_the_right_answers():
    """First question: 2 of 3 words in common with the second answer, F1 2·2/(3+2). Second: exact. Third: nothing."""
    predicted = ["big red house", "The cat", ""]
    true = [["green tree", "red house"], ["cat!"], ["dog"]]
    scores = answer_scores(predicted, true, "en")
    assert scores == pytest.approx({"f1": 100 * (0.8 + 1 + 0) / 3, "exact match": 100 / 3})


def test_repeated_words_count_as_often_as_both_have_them():
    assert answer_scores(["a b b b"], [["b b c"]], "zz")["f1"] == pytest.approx(100 * 2 * 2 / 7)
