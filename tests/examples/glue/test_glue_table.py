"""`python -m examples.glue.table`: figures worked out by hand."""

import json
from dataclasses import asdict

import pytest
from glue_tools import make_run, start

from examples.glue.rows import millions
from examples.glue.table import main
from experiments.tables import markdown_table
from experiments.terminal import run_and_exit


def record(score, model=54_000_000, layer=26_880, costs=None, **settings) -> dict:
    run = asdict(make_run(**{"density": 0.01, **settings}))
    trainable = {"model": model, "layer": layer, "layer_in_step": min(layer, 23_593), "layer_entries": 768 * 3072}
    measured = {"score": score, "best_epoch": 1, "evaluations": [], "trainable": trainable, "costs": costs}
    return {"run": run, **measured, "seconds": 1.0}


def sections(text: str) -> dict[str, list[list[str]]]:
    """The tables of a report by their titles."""
    return {title: rows(part) for title, _, part in (each.partition("\n") for each in text.split("### ")[1:])}


def write(path, records):
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


RECORDS = [
    *(record(score, seed=seed) for seed, score in enumerate((0.58, 0.60, 0.62))),
    *(record(score, task="stsb", seed=seed) for seed, score in enumerate((0.88, 0.90, 0.89))),
    *(record(score, seed=seed, lr=5e-5) for seed, score in enumerate((0.50, 0.51, 0.52))),
    record(0.99, lr=9e-5),
    record(0.40, method="sparsegrad", lr=2e-3, adapter_lr=1e-2, batch_size=16),
    record(0.41, method="sparsegrad", num_values=100_000),
    record(0.39, method="sparsegrad", num_values=18_000),
    record(0.70, method="full", density=1.0, model=109_500_000, layer=2_362_368),
]


def test_scores_by_method_from_the_command_line(tmp_path):
    results = write(tmp_path / "results.jsonl", RECORDS)
    done = start("table", results, "--out", tmp_path / "new" / "table.md")
    assert done.wait() == 0, done.stderr
    text = (tmp_path / "new" / "table.md").read_text()
    tables = sections(text)
    assert tables["Scores"] == [
        ["method", "density", "trained, model", "trained, MLP layer", "in a step", "seeds", "AVG", "STSB", "CoLA"],
        # The rate with one seed does not count beside those with three, and of these the better one does.
        ["lora", "1%", "54 mln", "0.027 mln", "0.024 mln", "3", "74.5", "89.0 ± 1.0", "60.0 ± 2.0"],
        ["sparsegrad", "1%", "54 mln", "0.027 mln", "0.024 mln", "1", "–", "–", "40.0"],
        ["full", "100%", "110 mln", "2.36 mln", "0.024 mln", "1", "–", "–", "70.0"],
    ]
    assert tables["Scores by density"] == [
        ["method", "values per layer", "of its entries", "seeds", "AVG", "STSB", "CoLA"],
        ["sparsegrad", "18,000", "0.763%", "1", "–", "–", "39.0"],
        ["sparsegrad", "–", "1%", "1", "–", "–", "40.0"],
        ["sparsegrad", "100,000", "4.24%", "1", "–", "–", "41.0"],
    ]
    assert tables["Batch sizes and learning rates"][1:3] == [
        ["lora", "1%", "8 / 0.001", "8 / 0.001"],
        ["sparsegrad", "1%", "–", "16 / 0.002, adapter 0.01"],
    ]


def test_other_settings_are_another_section(tmp_path, capsys):
    first = write(tmp_path / "a.jsonl", [record(0.5)])
    second = write(tmp_path / "b.jsonl", [record(0.6, rest="trained"), record(0.7, seed=1)])
    assert main([str(first), str(second)]) == 0
    text = capsys.readouterr().out
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert [title.count("rest trained") for title in titles] == [0, 1]
    assert all(title.startswith("## model m, data d, ") for title in titles)
    assert [row[-1] for row in rows(text) if row[0] == "lora"] == ["60.0 ± 14.1", "8 / 0.001", "60.0", "8 / 0.001"]


def test_seeds_that_differ_from_task_to_task(tmp_path, capsys):
    results = write(tmp_path / "a.jsonl", [record(0.5), record(0.5, task="stsb"), record(0.5, task="stsb", seed=1)])
    assert main([str(results)]) == 0
    assert rows(capsys.readouterr().out)[1][5:] == ["1 to 2", "50.0", "50.0 ± 0.0", "50.0"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "holds no finished run"),
        ('{"run"', "holds no finished run"),  # a killed process's only line
        ("{\n", "line 1 is not JSON"),
        ("{}\n", "line 1 is no result of examples.glue.train"),
        ('{"run": {"task": "cola"}, "score": 0.5}\n', "line 1 is no result of examples.glue.train"),
        (
            json.dumps(record(0.5, task="../x")) + "\n",
            "examples.glue.train: there is no task '../x'",
        ),
        (None, "cannot read"),
    ],
)
def test_files_that_are_no_results(tmp_path, capsys, content, reason):
    if content is not None:
        (tmp_path / "results.jsonl").write_text(content)
    with pytest.raises(SystemExit) as end:
        run_and_exit(lambda: main([str(tmp_path / "results.jsonl"), "--out", str(tmp_path / "table.md")]))
    assert end.value.code == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "table.md").exists()


def test_markdown_and_numbers():
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"
    assert [millions(n) for n in (109_483_778, 53_400_000, 26_880)] == ["109 mln", "53.4 mln", "0.027 mln"]


def test_costs_are_means_of_the_runs_and_dashes_where_one_was_not_measured(tmp_path, capsys):
    costs = {
        "seconds_per_step": 0.5,
        "peak_memory": 1_000_000_000,
        "optimizer_bytes": 2_000_000,
        "saved_bytes": 300_000,
    }
    slower = {**costs, "seconds_per_step": 0.3, "peak_memory": 2e9}
    records = [
        *(record(0.5, seed=seed, costs=each) for seed, each in enumerate((costs, slower))),
        record(0.5, task="stsb", costs=costs),
        record(0.5, method="paper", settings='{"slack": 3}', costs=costs),
        record(0.5, method="paper", settings='{"slack": 3}', seed=1),
    ]
    assert main([str(write(tmp_path / "results.jsonl", records))]) == 0
    tables = sections(capsys.readouterr().out)
    assert tables["Steps per second"] == [
        ["method", "AVG", "STSB", "CoLA"],
        ["lora", "2.25", "2.00", "2.50"],
        ["paper, slack 3", "–", "–", "–"],
    ]
    assert tables["Peak memory of a step, MB"][1] == ["lora", "1,250", "1,000", "1,500"]
    assert tables["Sizes, MB"] == [
        ["method", "optimizer state", "saved"],
        ["lora", "2.0", "0.3"],
        ["paper, slack 3", "–", "–"],
    ]
