"""Rows for the model, and what is read from its logits, with a tokenizer that splits words into pieces."""

from __future__ import annotations

import random

import numpy as np
import pytest
from xglue_files import WORDS, sentence

from examples.xglue import classification, question_answering, tagging
from examples.xglue.conll import TaggedSentence
from examples.xglue.question_answering import MAX_ANSWER_TOKENS, best_span
from examples.xglue.squad import Question
from examples.xglue.tasks import TASKS
from examples.xglue.tiny_encoder import train_tokenizer
from examples.xglue.tsv import TextPair
from peft_sparsegrad.cli.errors import InputError

POS, NER, MLQA = TASKS["POS"], TASKS["NER"], TASKS["MLQA"]
SENTENCE = TaggedSentence(["small", "extraordinary", "old"], [0, 7, 3])


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(WORDS), "which ? the of"])


def test_a_single_text_is_no_pair(tokenizer):
    (row,) = classification.training_features(tokenizer, TASKS["SIB-200"], [TextPair("red blue", None, 3)], 64)
    assert row == {**tokenizer("red blue"), "labels": 3}


def test_the_first_piece_of_a_word_has_its_label(tokenizer):
    (row,) = tagging.training_features(tokenizer, POS, [SENTENCE], 64)
    pieces = tokenizer.convert_ids_to_tokens(row["input_ids"])
    labels = dict(zip(pieces, row["labels"], strict=True))
    beginnings = [label for piece, label in zip(pieces, row["labels"], strict=True) if piece.startswith("▁")]
    assert beginnings == [0, 7, 3]
    assert len(pieces) > 3 + 2, "a word must have several pieces here"
    assert sum(label != -100 for label in row["labels"]) == 3
    assert labels["<s>"] == labels["</s>"] == -100


def peaked_logits(rows, labels: list[list[int]], count: int) -> np.ndarray:
    """Logits that say, at the first token of each word, its label; noise elsewhere."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(len(rows.features), 64, count))
    for row, (positions, right) in enumerate(zip(rows.positions, labels, strict=True)):
        for word, position in positions.items():
            logits[row, position] = 0
            logits[row, position, right[word]] = 50
    return logits


def test_words_are_read_from_their_first_piece(tokenizer):
    rows = tagging.evaluation_set(tokenizer, POS, [SENTENCE], "en", 64)
    assert "labels" not in rows.features[0]
    assert rows.score(peaked_logits(rows, [[0, 7, 3]], 17)) == {"accuracy": 100.0}
    assert rows.score(peaked_logits(rows, [[0, 7, 4]], 17))["accuracy"] == pytest.approx(200 / 3)


def test_words_beyond_the_length_count_as_no_entity_and_as_wrong(tokenizer):
    """XGLUE's own evaluation fills up with O."""
    words, begin = ["red"] * 30, NER.labels.index("B-PER")
    entities = TaggedSentence(words, [begin] + [0] * 28 + [begin])
    rows = tagging.evaluation_set(tokenizer, NER, [entities], "en", 16)
    assert len(rows.features[0]["input_ids"]) == 16
    assert rows.score(peaked_logits(rows, [entities.labels], 9))["recall"] == 50.0
    rows = tagging.evaluation_set(tokenizer, POS, [TaggedSentence(words, [2] * 30)], "en", 16)
    assert rows.score(peaked_logits(rows, [[2] * 30], 17))["accuracy"] == pytest.approx(
        100 * len(rows.positions[0]) / 30
    )


def test_pages_of_a_query_are_ranked_by_their_predicted_rating(tokenizer):
    pairs = [TextPair("red", "old", 3), TextPair("red", "new", 1), TextPair("blue", "old", 0)]
    rows = classification.evaluation_set(tokenizer, TASKS["WPR"], pairs, "en", 64)
    assert rows.score(np.eye(5)[[4, 0, 0]])["ndcg"] == pytest.approx(100)
    assert rows.score(np.eye(5)[[0, 4, 0]])["ndcg"] < 90
    with pytest.raises(InputError, match="WPR in en: no query has two pages"):
        classification.evaluation_set(tokenizer, TASKS["WPR"], pairs[1:], "en", 64)


def make_questions(count: int = 12) -> list[Question]:
    """Contexts of several windows, with answers all over them."""
    rng, questions = random.Random(0), []
    for number in range(count):
        context = sentence(rng, 60)
        starts = [i for i in range(len(context)) if i == 0 or context[i - 1] == " "]
        start = starts[number * (len(starts) - 3) // count]
        answer = " ".join(context[start:].split(" ")[: 1 + number % 3])
        questions.append(Question(str(number), "which of the " + "red " * number, context, (answer,), start))
    return questions


def test_each_answer_is_marked_in_some_window_and_never_a_wrong_span(tokenizer):
    questions = make_questions()
    rows = question_answering.training_features(tokenizer, MLQA, questions, 48)
    windows = question_answering.evaluation_set(tokenizer, MLQA, questions, "en", 48).windows
    assert len(rows) > 2 * len(questions), "each context needs several windows here"
    assert max(len(row["input_ids"]) for row in rows) <= 48
    marked = set()
    for row, window in zip(rows, windows, strict=True):
        question = questions[window.question]
        if row["start_positions"]:
            begin, end = window.offsets[row["start_positions"]][0], window.offsets[row["end_positions"]][1]
            assert question.context[begin:end].strip() == question.answers[0]
            marked.add(window.question)
        else:
            assert row["end_positions"] == 0
    assert marked == set(range(len(questions)))


def test_logits_that_peak_at_the_answers_give_their_text(tokenizer):
    """Also where the answer lies in a later window than the first."""
    questions = make_questions()
    rows = question_answering.training_features(tokenizer, MLQA, questions, 48)
    questions_set = question_answering.evaluation_set(tokenizer, MLQA, questions, "en", 48)
    starts, ends = np.full((2, len(rows), 60), -100.0)  # padded, as the Trainer does
    rng = np.random.default_rng(0)
    later = set()
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        starts[number, :length], ends[number, :length] = rng.normal(size=(2, length))
        if row["start_positions"]:
            starts[number, row["start_positions"]] = ends[number, row["end_positions"]] = 20
            question = questions_set.windows[number].question
            if number and questions_set.windows[number - 1].question == question:
                later.add(question)
    assert later, "an answer must lie in a second window"
    assert questions_set.predicted_answers(starts, ends) == [question.answers[0] for question in questions]
    assert questions_set.score((starts, ends)) == {"f1": 100.0, "exact match": 100.0}


def test_the_context_alone_can_be_an_answer(tokenizer):
    """Logits that are largest outside the context, which hold no answer."""
    question = Question("0", "which red?", "blue green", ("blue",), 0)
    rows = question_answering.evaluation_set(tokenizer, MLQA, [question], "en", 48)
    logits = np.full((1, 48), 99.0)
    inside = [i for i, offset in enumerate(rows.windows[0].offsets) if offset is not None]
    logits[0, inside] = 0
    logits[0, inside[0]] = 1
    assert rows.predicted_answers(logits, logits)[0] in question.context


def test_best_span_equals_a_search_over_all_spans():
    rng = np.random.default_rng(0)
    for _ in range(20):
        offsets = [None, None, *((i, i + 1) for i in range(50)), None]
        starts, ends = rng.normal(size=(2, len(offsets) + 5))
        expected = max(
            (starts[a] + ends[b], a - 2, b - 1) for a in range(2, 52) for b in range(a, min(52, a + MAX_ANSWER_TOKENS))
        )
        found = best_span(starts, ends, offsets)
        assert found == pytest.approx(expected)
    assert best_span(starts, ends, [None, None]) is None


def test_a_window_says_where_characters_are_only_if_it_has_all_of_them():
    window = question_answering.Window(0, [None, (10, 13), (14, 18), (19, 22), None])
    assert window.tokens_of(14, 18) == (2, 2)
    assert window.tokens_of(11, 20) == (1, 3)
    assert window.tokens_of(9, 12) is None
    assert window.tokens_of(19, 23) is None
