"""Files of labelled sentences as spreadsheets and crawlers write them."""

import pytest

from peft_sparsegrad.cli.data import LabelledSentences, read_labelled


@pytest.mark.parametrize(("name", "between"), [("rows.tsv", "\t"), ("rows.csv", ",")])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_mark_at_the_beginning_and_separators_inside_a_sentence_are_text(tmp_path, name, between, mark):
    lines = [f"sentence{between}label", f"one\u2028line{between}1", f"another{between}0"]
    (tmp_path / name).write_text(mark + "\n".join(lines) + "\n", encoding="utf-8")
    found = read_labelled(tmp_path / name)
    assert found.texts == ["one\u2028line", "another"]
    assert found.labels == [1, 0]


@pytest.mark.parametrize(
    ("names", "label2id", "numbers"),
    [
        (["bad", "good"], {"good": 0, "bad": 1}, [1, 0]),  # not in the order of the alphabet
        (["1", "2"], {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}, [1, 2]),  # the file lacks a label of the model
        (["10", "2"], {f"LABEL_{number}": number for number in range(11)}, [10, 2]),
        (["bad", "good"], {"LABEL_0": 0, "LABEL_1": 1}, None),
        (["0", "2"], {"LABEL_0": 0, "LABEL_1": 1}, None),
    ],
)
def test_labels_take_the_numbers_of_the_model_or_none(names, label2id, numbers):
    found = LabelledSentences(["a", "b"], [0, 1], names).numbered_as(label2id)
    assert (found and found.labels) == numbers
    assert found is None or found.names == sorted(label2id, key=label2id.get)
