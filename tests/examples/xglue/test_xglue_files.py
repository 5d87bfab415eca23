"""The readers of XGLUE's files, and what they say about files that are wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from xglue_files import LANGUAGES, write_benchmark

from examples.xglue.conll import TaggedSentence
from examples.xglue.files import read_examples
from examples.xglue.squad import Question
from examples.xglue.tasks import TASKS, XGLUE
from examples.xglue.tsv import TextPair
from peft_sparsegrad.cli.errors import InputError

SAMPLE = Path(__file__).parents[3] / "examples" / "xglue" / "sample"
UPOS = TASKS["POS"].labels


def read(folder: Path, task: str, content: str | bytes, split: str = "test"):
    """The examples of an English file with that content."""
    path = folder / TASKS[task].file(split, "en")  # pyright: ignore
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_examples(folder, TASKS[task], split, "en")  # pyright: ignore


def test_tasks_languages_and_scores_are_the_benchmarks():
    """XGLUE's table 1; the paper's tables I to IX."""
    counts = {name: len(task.languages) for name, task in XGLUE.items()}
    assert counts == {
        **{"XNLI": 15, "NC": 5, "NER": 4, "PAWS-X": 4, "POS": 18},
        **{"QAM": 3, "QADSM": 3, "WPR": 7, "MLQA": 7},
    }
    metrics = {name: task.metric for name, task in XGLUE.items() if task.metric != "accuracy"}
    assert metrics == {"NER": "f1", "WPR": "ndcg", "MLQA": "f1"}
    assert all(task.languages[0] == "en" for task in TASKS.values())
    assert len(TASKS["NC"].labels) == 10
    assert len(UPOS) == 17
    assert len(TASKS["NER"].labels) == 9


@pytest.mark.parametrize("task", list(TASKS))
def test_every_task_is_read(task, tmp_path):
    write_benchmark(tmp_path)
    for split, language, count in [("train", "en", 8), ("dev", "en", 4), *(("test", x, 4) for x in LANGUAGES)]:
        assert len(read_examples(tmp_path, TASKS[task], split, language)) == count
    assert len(read_examples(tmp_path, TASKS[task], "train", "en", max_rows=3)) == 3


@pytest.mark.parametrize(("task", "language"), [(t, x) for t in ("POS", "NC", "XNLI") for x in ("en", "de", "es")])
def test_the_sample_is_read(task, language):
    assert len(read_examples(SAMPLE, TASKS[task], "test", language)) == 4


def test_topics_are_read_as_sib_200_has_them(tmp_path):
    """A quotation mark is part of the text, the label is before it, and files are in folders of their own codes."""
    rows = 'index_id\tcategory\ttext\n431\tscience/technology\tA "laptop.\n7\tgeography\tRivers.\n'
    assert read(tmp_path, "SIB-200", rows) == [TextPair('A "laptop.', None, 4), TextPair("Rivers.", None, 1)]
    assert TASKS["SIB-200"].file("test", "sw") == "sib200/swh_Latn/test.tsv"
    assert TASKS["SIB-200"].file("train", "en") == "sib200/eng_Latn/train.tsv"
    with pytest.raises(InputError, match="line 2: 2 columns in place of 3, which are id, label, text"):
        read(tmp_path, "SIB-200", "index_id\tcategory\ttext\n431\tgeography\n")


def test_parts_of_speech_are_read_as_universal_dependencies_has_them(tmp_path):
    rows = ["1-2\tzum\t_\t_", "1\tzu\tzu\tADP", "2\tdem\tder\tDET", "2.1\tein\t_\tX"]
    text = "# text = zum\n" + "".join(row + "\t_" * 6 + "\n" for row in rows)
    assert read(tmp_path, "UD", text) == [TaggedSentence(["zu", "dem"], [UPOS.index("ADP"), UPOS.index("DET")])]
    assert TASKS["UD"].file("test", "hi") == "ud/hi.test.conllu"


def test_text_columns_become_two_texts(tmp_path):
    assert read(tmp_path, "QADSM", "shoes\tGood shoes\tcheap here\tGood\n") == [
        TextPair("shoes", "Good shoes cheap here", 1)
    ]
    rows = "id\tsentence1\tsentence2\tlabel\n7\tone\ttwo\t1\n"
    assert read(tmp_path, "PAWS-X", rows) == [TextPair("one", "two", 1)]


def test_training_files_of_xnli_spell_a_label_in_their_own_way(tmp_path):
    rows = read(tmp_path, "XNLI", "premise\thypo\tlabel\na\tb\tcontradictory\n", "train")
    assert rows == read(tmp_path, "XNLI", "a\tb\tcontradiction\n")


def test_ratings_may_be_words(tmp_path):
    assert read(tmp_path, "WPR", "q\tt\ts\tPerfect\n") == read(tmp_path, "WPR", "q\tt\ts\t4\r\n")


def test_a_line_separator_inside_a_text_does_not_end_the_row(tmp_path):
    assert read(tmp_path, "QAM", "what\tone\u2028two\x85three\t1\n") == [TextPair("what", "one\u2028two\x85three", 1)]


def test_words_and_labels_in_two_columns(tmp_path):
    content = "-DOCSTART- O\n\nAnna B-PER\n# O\n\n\nParis\tB-LOC\n"
    labels = TASKS["NER"].labels
    assert read(tmp_path, "NER", content) == [
        TaggedSentence(["Anna", "#"], [labels.index("B-PER"), 0]),
        TaggedSentence(["Paris"], [labels.index("B-LOC")]),
    ]


def test_conllu_gives_the_words_and_their_upos(tmp_path):
    """Without comments, multiword tokens and empty nodes; a word may hold a space."""
    rest = "\t_" * 6
    lines = [
        "# text = vámonos 10 000",
        f"1-2\tvámonos\t_\t_{rest}",
        f"1\tvamos\t_\tVERB{rest}",
        f"2\tnos\t_\tPRON{rest}",
    ]
    lines += [f"2.1\tempty\t_\tVERB{rest}", f"3\t10 000\t_\tNUM{rest}"]
    assert read(tmp_path, "POS", "\n".join(lines) + "\n\n") == [
        TaggedSentence(["vamos", "nos", "10 000"], [UPOS.index(tag) for tag in ("VERB", "PRON", "NUM")])
    ]


def squad(answers: list[dict], context: str = "the cat sleeps") -> str:
    qas = [{"id": "q1", "question": "who?", "answers": answers}]
    return json.dumps({"data": [{"paragraphs": [{"context": context, "qas": qas}]}]})


def test_questions_keep_all_answers_and_the_place_of_the_first(tmp_path):
    content = squad([{"text": "cat", "answer_start": 4}, {"text": "the cat", "answer_start": 0}])
    assert read(tmp_path, "MLQA", content) == [Question("q1", "who?", "the cat sleeps", ("cat", "the cat"), 4)]


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("QAM", "q\ta\t1\nq\ta\n", r"xglue\.qam\.en\.test, line 2: 2 columns in place of 3, which are question"),
        ("QAM", "q\ta\t2\n", r"line 1: '2' is no label of QAM, which has 0, 1"),
        ("QAM", "\n\n", "holds no examples"),
        ("QAM", b"\xff\xfe\n", "cannot read .*xglue.qam.en.test"),
        ("PAWS-X", "1\ta\tb\t1\n", r"test_2k\.tsv, line 1: a header is needed"),
        ("NER", "Anna NNP B-PER\n", r"en\.test, line 1: 3 columns in place of 2"),
        ("NER", "Anna O\n\nBob X-PER\n", r"en\.test, line 3: 'X-PER' is no label of NER"),
        (
            "POS",
            "1\tgo\t_\tVERB\t_\t_\t_\t_\t_\t_\n2\tnow\t_\tADV\n",
            r"line 2: 4 columns in place of the 10 of CoNLL-U",
        ),
        ("MLQA", "{", "cannot read .*question-en.json"),
        ("MLQA", "{}", "it needs `data` with `paragraphs`"),
        ("MLQA", squad([]), "paragraph 1, question q1 has no answer"),
        ("MLQA", squad([{"text": "cat"}]), "paragraph 1, question q1 lacks 'answer_start'"),
        ("MLQA", squad([{"text": "cat", "answer_start": "x"}]), "question q1 is not in the format of SQuAD"),
        ("MLQA", '{"data": [{"paragraphs": [7]}]}', "paragraph 1 is not in the format of SQuAD"),
    ],
)
def test_a_malformed_file_is_named_with_the_place(task, content, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read(tmp_path, task, content)


def test_an_answer_to_train_on_must_be_where_the_file_says(tmp_path):
    misplaced = squad([{"text": "cat", "answer_start": 5}])
    with pytest.raises(InputError, match="question q1 is not at its `answer_start`"):
        read(tmp_path, "MLQA", misplaced, "train")
    assert read(tmp_path, "MLQA", misplaced)  # a test set is scored by the text alone


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*POS/th\.test: .*No such file"):
        read_examples(tmp_path, TASKS["POS"], "test", "th")
