"""Files of results: what comes back, and what a killed process leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from experiments.results import append_json_line, append_result, finished_runs, read_json_lines, read_results
from experiments.runs import BaseRun
from peft_sparsegrad.cli.errors import InputError


@dataclass(frozen=True)
class Run(BaseRun):
    """A run of no program."""

    PROGRAM: ClassVar[str] = "a program"

    layers: tuple[str, ...] | None


RUN = Run("m", "t", "lora", 0, 1e-3, ("a", "b"))


def test_a_run_comes_back_as_the_key_of_its_record(tmp_path):
    path, other = tmp_path / "new" / "results.jsonl", Run("m", "t", "lora", 1, 1e-3, None)
    assert finished_runs(path, Run) == set()
    append_result(path, RUN, {"score": 0.5})
    append_result(path, other, {"score": 0.25})
    results = read_results(path, Run)
    assert [(run, record["score"]) for run, record in results.items()] == [(RUN, 0.5), (other, 0.25)]
    assert finished_runs(path, Run) == {RUN, other}


def test_a_half_written_line_is_left_out_and_written_over(tmp_path):
    path = tmp_path / "lines.jsonl"
    append_json_line(path, 1)
    with path.open("ab") as file:
        file.write(b'{"half')
    assert read_json_lines(path) == [1]
    append_json_line(path, 2)
    assert path.read_bytes() == b"1\n2\n"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 1 is not JSON"),
        ("[1]", "line 1 is no result of a program"),
        ('{"run": 1}', "line 1 is no result of a program"),
        ('{"run": {"model": "m", "task": "t", "seed": 0, "lr": 1}}', "it lacks layers, method, as an older version"),
        (
            '{"run": {"model": "m", "task": "t", "method": "lora", "seed": 0, "lr": 1, "layers": null, "new": 1}}',
            "it has the unknown settings new",
        ),
    ],
)
def test_a_line_that_is_no_result_is_named(tmp_path, line, reason):
    path = tmp_path / "results.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(InputError, match=reason):
        read_results(path, Run)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*nowhere\.jsonl"):
        read_results(tmp_path / "nowhere.jsonl", Run)


def test_every_setting_counts_in_the_name_of_the_folder():
    assert RUN.folder_name == "t-lora-0-a4bc3adfb2c1"
    assert RUN.folder_name != Run("m", "t", "lora", 0, 1e-3, ("a",)).folder_name
