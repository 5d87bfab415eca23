"""Text files, tables of columns, and JSON files that others wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.json_files import parse_records, read_json, read_records, text_field, text_list, write_json
from experiments.text_files import file_in, make_folder, read_lines, read_table, write_whole
from peft_sparsegrad.cli.errors import InputError


def test_lines_end_at_line_feeds_alone(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\u2028still two\rand here\n".encode())
    assert read_lines(tmp_path / "a.txt") == ["one", "two\u2028still two\rand here", ""]


def test_quotation_marks_mean_nothing_between_tabs(tmp_path):
    (tmp_path / "a.tsv").write_text('a\t"b\n\nc\td"\n')
    assert read_table(tmp_path / "a.tsv") == [(1, ["a", '"b']), (3, ["c", 'd"'])]


def test_quotation_marks_hold_a_column_together_between_commas(tmp_path):
    (tmp_path / "a.csv").write_text('a,"b, ""c""\nand d"\n\ne,f\u2028g\n')
    assert read_table(tmp_path / "a.csv") == [(2, ["a", 'b, "c"\nand d']), (4, ["e", "f\u2028g"])]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", b'a,"b\n', r"cannot read .*a\.csv: unexpected end of data"),
        ("a.tsv", b"\xff\n", r"cannot read .*a\.tsv: .*utf-8"),
        ("a.tsv", None, r"cannot read .*a\.tsv: No such file or directory$"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(tmp_path, name, content, reason):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=reason):
        read_table(tmp_path / name)


def test_a_file_is_written_whole_and_nothing_is_left_beside_it(tmp_path):
    write_whole(tmp_path / "a", b"1")
    write_whole(tmp_path / "a", b"2")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"2"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot make the folder .*file/below"):
        make_folder(tmp_path / "file" / "below")


def test_a_plain_name_is_a_file_in_the_folder():
    assert file_in("outputs", "llama3:8b v1.5", ".jsonl", "--out") == Path("outputs/llama3:8b v1.5.jsonl")


@pytest.mark.parametrize("name", ["", " ", ".", "..", ".a", "../a", "/a", "a/b", "a\\b", "a\nb", "a\0b", "é" * 100])
def test_a_name_that_leads_elsewhere_is_refused(name):
    with pytest.raises(InputError, match=r"cannot be the name of a file in outputs: give --out$"):
        file_in("outputs", name, ".jsonl", "--out")


def test_records_know_their_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": "\u2028"}\n')
    assert read_records(path) == [(f"{path}, line 1", {"a": 1}), (f"{path}, line 3", {"a": "\u2028"})]
    with pytest.raises(InputError, match="line 1: a record needs `a`, a string"):
        parse_records(path, lambda record: text_field(record, "a"), "`a`, a string")


@pytest.mark.parametrize(
    ("content", "reason"),
    [("\n", "is empty"), ("{\n", "line 1: this is not JSON"), ("{}\n[1]\n", "line 2: this is not a JSON object")],
)
def test_lines_that_are_no_records(tmp_path, content, reason):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(InputError, match=reason):
        read_records(tmp_path / "a.jsonl")


def test_json_files_come_back(tmp_path):
    path = tmp_path / "new" / "a.json"
    assert read_json(path) is None
    write_json(path, {"a": [1, None]})
    assert read_json(path) == {"a": [1, None]}
    path.write_text("{")
    with pytest.raises(InputError, match=r"cannot read .*a\.json"):
        read_json(path)


@pytest.mark.parametrize(("values", "error"), [("text", TypeError), ([1], TypeError), ([], ValueError)])
def test_what_is_no_list_of_strings(values, error):
    assert text_list(["a"]) == ["a"]
    with pytest.raises(error):
        text_list(values)
