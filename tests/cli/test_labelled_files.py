"""Files of labelled sentences as spreadsheets and crawlers write them."""

import pytest

from peft_sparsegrad.cli.data import read_labelled


@pytest.mark.parametrize(("name", "between"), [("rows.tsv", "\t"), ("rows.csv", ",")])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_mark_at_the_beginning_and_separators_inside_a_sentence_are_text(tmp_path, name, between, mark):
    lines = [f"sentence{between}label", f"one\u2028line{between}1", f"another{between}0"]
    (tmp_path / name).write_text(mark + "\n".join(lines) + "\n", encoding="utf-8")
    found = read_labelled(tmp_path / name)
    assert found.texts == ["one\u2028line", "another"]
    assert found.labels == [1, 0]
