"""Files and folders that are written in full or not at all, and what is printed of numbers and names."""

import errno
import json
import os
from dataclasses import dataclass

import pytest

from peft_sparsegrad.cli.errors import InputError, disk_is_full, one_line_errors
from peft_sparsegrad.cli.files import check_file, check_folder, replacing_file, replacing_folder
from peft_sparsegrad.cli.output import new_console, percent, print_facts, print_json, print_table, shape


def write_half(path):
    """Write to a file, and fail on the way."""
    path.write_text("half")
    path.write_text("whole \ud800", encoding="utf-8")


def test_file_takes_its_place_at_the_end(tmp_path):
    path = tmp_path / "new" / "out.txt"
    with replacing_file(path) as partial:
        partial.write_text("whole")
        assert not path.exists()
        assert partial.parent == path.parent
    assert path.read_text() == "whole"
    assert [*path.parent.iterdir()] == [path]


def test_file_stays_as_it_was_after_an_error(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("mine")
    with pytest.raises(UnicodeEncodeError), replacing_file(path) as partial:
        write_half(partial)
    assert path.read_text() == "mine"
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "other files"])
def test_folder_gets_all_its_files_at_the_end(tmp_path, there):
    path = tmp_path / "out"
    if there != "nothing":
        path.mkdir()
    if there == "other files":
        (path / "notes.txt").write_text("mine")
        (path / "a.txt").write_text("old")
    with replacing_folder(path) as partial:
        (partial / "a.txt").write_text("a")
        (partial / "b.txt").write_text("b")
        assert not (path / "b.txt").exists()
    expected = {"a.txt": "a", "b.txt": "b", **({"notes.txt": "mine"} if there == "other files" else {})}
    assert {file.name: file.read_text() for file in path.iterdir()} == expected
    assert [*tmp_path.iterdir()] == [path]


def test_folder_stays_as_it_was_after_an_error(tmp_path):
    path = tmp_path / "out"
    with pytest.raises(UnicodeEncodeError), replacing_folder(path) as partial:
        write_half(partial / "a.txt")
    assert not list(tmp_path.iterdir())


def test_rest_of_a_killed_run_is_no_part_of_the_next(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "old.txt").write_text("old")
    with replacing_folder(tmp_path / "out") as partial:
        (partial / "new.txt").write_text("new")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["new.txt"]


def test_file_that_must_not_be_written_is_named(tmp_path):
    (tmp_path / "a.png").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    cases = {
        "must end in .png or .svg": (tmp_path / "a.txt", False),
        "is there already: name another file, or give --overwrite": (tmp_path / "a.png", False),
        "is a folder, and a file is to be written": (tmp_path / "folder.png", True),
        "cannot be written to": (tmp_path / "a.png" / "b.png", True),
    }
    for message, (path, overwrite) in cases.items():
        with pytest.raises(InputError, match=message):
            check_file(path, overwrite, (".png", ".svg"))
    check_file(tmp_path / "a.png", True, (".png",))
    check_file(tmp_path / "new" / "and" / "new.svg", False, (".png", ".svg"))
    assert not (tmp_path / "new").exists()


def test_folder_that_must_not_be_written_is_named(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    cases = {
        "is a file, and a folder is to be written": (tmp_path / "full" / "a.txt", True),
        "is not empty: name another folder, or give --overwrite": (tmp_path / "full", False),
        "cannot be written to": (tmp_path / "full" / "a.txt" / "b", True),
    }
    for message, (path, overwrite) in cases.items():
        with pytest.raises(InputError, match=message):
            check_folder(path, overwrite)
    for path, overwrite in (("full", True), ("empty", False), ("new/folder", False)):
        check_folder(tmp_path / path, overwrite)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_is_told_from_its_number_its_words_and_its_cause(number):
    assert disk_is_full(OSError(number, os.strerror(number)))
    assert disk_is_full(RuntimeError(f"I/O error: ... (os error {number})"))
    wrapped = RuntimeError("cannot save")
    wrapped.__cause__ = OSError(number, os.strerror(number))
    assert disk_is_full(wrapped)


def test_other_errors_are_no_full_disk():
    assert disk_is_full(RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0"))
    for error in (OSError(errno.EACCES, "denied"), ValueError("no"), OSError("without a number")):
        assert not disk_is_full(error)


@pytest.mark.usefixtures("command")  # which brings the verbosity of the libraries back
def test_only_input_and_a_full_disk_end_in_one_line(capsys):
    for error, line in (
        (InputError("this is wrong"), "error: this is wrong\n"),
        (OSError(errno.ENOSPC, "No space left"), "error: the disk is full ([Errno 28] No space left); "),
    ):
        with pytest.raises(SystemExit) as ended, one_line_errors():
            raise error
        assert ended.value.code == 2
        found = capsys.readouterr().err
        assert found.startswith(line)
        assert found.count("\n") == 1
    with pytest.raises(ZeroDivisionError), one_line_errors():
        raise ZeroDivisionError


@dataclass
class Numbers:
    values: list[float]
    by_name: dict[int, tuple[float, int]]
    name: str | None = None


def test_json_has_null_for_what_it_lacks(capsys):
    print_json(Numbers([1.5, float("inf")], {3: (float("nan"), 4)}))
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found == {"values": [1.5, None], "by_name": {"3": [None, 4]}, "name": None}
    print_json({"of": {2}, "inner": [{"x": -float("inf")}]})
    assert json.loads(capsys.readouterr().out) == {"of": [2], "inner": [{"x": None}]}


def test_tables_show_names_as_they_are_and_a_dash_for_nothing(capsys):
    print_table(new_console(), "Title", ("name", "number"), [("a[bold]b[/bold]", 3), ("c", None)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines == [["Title"], ["name", "number"], ["a[bold]b[/bold]", "3"], ["c", "-"]]
    print_facts(new_console(), [("method", "LORA"), ("nothing", None), ("number", 0)])
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [["method", "LORA"], ["number", "0"]]


def test_long_names_are_not_cut_off_in_a_file(capsys):
    name = "layers." * 20 + "up_proj"
    print_table(new_console(), "Title", ("name", "number"), [(name, 3)])
    assert name in capsys.readouterr().out


def test_shares_and_shapes():
    assert (percent(0.12345), percent(0.12345, 2), percent(1.0), percent(None)) == ("12.3%", "12.35%", "100.0%", None)
    assert (shape((64, 32)), shape([7]), shape(None)) == ("64 x 32", "7", None)
