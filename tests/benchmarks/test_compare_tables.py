"""Tables and figures of the comparison, from results that nobody had to train for."""

from __future__ import annotations

import builtins
import math
from pathlib import Path

import pytest
import scipy.stats

from benchmarks.compare.__main__ import main
from benchmarks.compare.difference import interval, verdict
from benchmarks.compare.runs import Run
from benchmarks.compare.selection import best_rate, series_of
from benchmarks.energy import table as table_of_energy
from benchmarks.frontier.costs import measured_methods
from benchmarks.frontier.runs import Run as FrontierRun
from examples.glue.runs import Run as GlueRun
from examples.glue.table import report
from examples.xglue.runs import Run as CrosslingualRun
from experiments.results import append_result, read_json_lines, read_results

ROOT = Path(__file__).parents[2]


def write(path: Path, losses: dict, task: str = "cola", method: str = "lora", **settings) -> Path:
    """Add runs with the final dev losses {(learning rate, seed): loss}, and 1 - loss as the metric."""
    for (lr, seed), loss in losses.items():
        shared = {"settings": "{}", "density": 0.01, "epochs": 1, "train_rows": 8, "batch_size": 4, "evals": 2}
        shared |= settings
        scores = [{"step": step, "metric": 1 - loss / step, "loss": loss / step} for step in (2, 1)]
        counts = {"trained_parameters": 1234, "trained_head_parameters": 5, "adapter_bytes": 6000}
        costs = {"seconds_per_step": seed + 1.0, "kept_memory": 2_000_000, "peak_memory": None}
        append_result(path, Run("m", task, method, seed, lr, **shared), {"evaluations": scores, **counts, **costs})
    return path


def printed(capsys, *arguments: str | Path) -> list[list[str]]:
    """The cells of every line of the tables that are printed."""
    assert main(["table", *map(str, arguments)]) == 0
    lines = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| cola")]


def records(losses: dict) -> dict:
    rates: dict = {}
    for (lr, seed), loss in losses.items():
        rates.setdefault(lr, {})[seed] = {"evaluations": [{"step": 1, "loss": loss, "metric": 0.0}]}
    return rates


def test_a_row_has_means_and_sample_deviations(tmp_path, capsys):
    out = write(tmp_path / "out.jsonl", {(1e-3, 0): 0.52, (1e-3, 1): 0.41, (1e-3, 2): 0.45})
    comparison, rates = printed(capsys, out, out)
    figures = ["0.5400 ± 0.0557", "0.4600 ± 0.0557", "1,234", "5", "6,000", "2.000", "2.0", "–"]
    assert comparison == ["cola", "lora", "0.001", "3", *figures]
    assert rates == ["cola", "lora", "**0.4600 ± 0.0557 (3)**", "the only one"]


def test_a_method_is_at_its_best_rate_and_settings_make_a_method(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    write(out, {(1e-4, 0): 0.5, (1e-3, 0): 0.4, (1e-2, 0): 0.6})
    write(out, {(1e-4, 0): 0.5, (1e-3, 0): 0.4, (1e-2, 0): 0.3}, method="sparsegrad", settings='{"rank": 7}')
    rows = printed(capsys, out)
    assert [row[1:6] for row in rows[:2]] == [
        ["lora", "0.001", "1", "0.6000", "0.4000"],
        ["sparsegrad, rank 7", "0.01", "1", "0.7000", "0.3000"],
    ]
    assert [row[2:] for row in rows[2:]] == [
        ["0.5000 (1)", "**0.4000 (1)**", "0.6000 (1)", "inside"],
        ["0.5000 (1)", "0.4000 (1)", "**0.3000 (1)**", "at the edge"],
    ]


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ({(1, 0): 0.5, (1, 1): 0.1, (2, 0): 0.4, (2, 1): 0.3}, 1),
        ({(1, 0): 0.5, (1, 1): 0.1, (1, 2): 0.9, (2, 0): 0.4, (2, 1): 0.3}, 1),  # seed 2 is not shared
        ({(1, 0): 0.5, (1, 1): 0.5, (2, 0): 0.1}, 1),  # one seed does not count beside two
        ({(1, 0): 0.5, (2, 0): 0.1}, 2),  # but it does among others with one
        ({(1, 0): 0.1, (1, 1): 0.1, (2, 2): 0.3, (2, 3): 0.3, (2, 4): 0.3}, 2),  # none shared: the most seeds
        ({(1, 0): math.nan, (2, 0): 5.0}, 2),
    ],
)
def test_the_best_rate(losses, best):
    assert best_rate(records(losses)) == best


def test_differences_are_taken_seed_by_seed_between_the_best_rates(tmp_path, capsys):
    out = write(tmp_path / "out.jsonl", {(1e-3, 0): 0.5, (1e-3, 1): 0.7, (1e-3, 2): 0.6, (1e-2, 0): 9, (1e-2, 1): 9})
    write(out, {(1e-2, 0): 0.4, (1e-2, 1): 0.59, (1e-2, 2): 0.51, (1e-2, 3): 0.1}, method="shira")
    write(out, {(1e-2, 0): 0.7, (1e-2, 1): 0.5, (1e-2, 2): 0.6}, method="full")
    write(out, {(1e-2, 1): 0.5}, method="meprop")
    rows = {row[1]: row[2:] for row in printed(capsys, out, "--against", "lora")[-3:]}
    low, high = scipy.stats.t.interval(0.95, 2, loc=-0.1, scale=scipy.stats.sem([-0.1, -0.11, -0.09]))
    loss, metric = f"-0.1000 ({low:+.4f} to {high:+.4f})", f"+0.1000 ({-high:+.4f} to {-low:+.4f})"
    assert rows["shira"] == ["3", loss, "better", metric, "better"]
    assert (rows["full"][2], rows["full"][4]) == ("level", "level")
    assert rows["meprop"] == ["1", "-0.2000", "one seed", "+0.2000", "one seed"]


def test_a_lower_perplexity_is_better(tmp_path, capsys):
    out = write(tmp_path / "out.jsonl", {(1, 0): 0.5, (1, 1): 0.7}, task="instructions")
    write(out, {(1, 0): 0.4, (1, 1): 0.6001}, task="instructions", method="full")  # the "metric" is 1 - loss
    assert main(["table", "--against", "lora", str(out)]) == 0
    text = capsys.readouterr().out
    assert "instructions: perplexity, lower is better" in text
    assert text.splitlines()[-1].split("|")[5].strip() == "better"
    assert text.splitlines()[-1].split("|")[7].strip() == "worse"


def test_intervals_and_verdicts():
    assert interval([0.25, 0.25]) == (0.25, 0.25)
    low, high = interval([1.0, 2.0, 4.0])
    assert scipy.stats.ttest_1samp([1.0, 2.0, 4.0], low).pvalue == pytest.approx(0.05)
    assert scipy.stats.ttest_1samp([1.0, 2.0, 4.0], high).pvalue == pytest.approx(0.05)
    assert [verdict(*bounds, True) for bounds in ((0.1, 0.2), (-0.1, 0.2), (-0.2, -0.1))] == [
        "better",
        "level",
        "worse",
    ]
    assert [verdict(*bounds, False) for bounds in ((0.1, 0.2), (0, 0), (-0.2, -0.1))] == ["worse", "level", "better"]


def test_other_settings_are_another_table(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    for rows in (14, 1400):
        write(out, {(1, 0): 0.5}, train_rows=rows)
    assert main(["table", str(out)]) == 0
    text = capsys.readouterr().out
    assert text.count("Dev loss at every learning rate") == 2
    assert text.index("training rows 14,") < text.index("training rows 1400,")


def test_a_report_has_tables_and_the_same_figures_each_time(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    for method in ("lora", "full"):
        write(out, {(lr, seed): 0.5 + lr + seed / 9 for lr in (0.1, 0.01) for seed in (0, 1)}, method=method)
    write(out, {(0.1, 0): 2.0}, task="stsb")
    for folder in ("one", "two"):
        assert main(["report", str(out), "--against", "lora", "--out", str(tmp_path / folder)]) == 0
    names = ["cola.png", "cola.svg", "stsb.png", "stsb.svg", "tables.md"]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert "Difference to lora" in (tmp_path / "one/tables.md").read_text()
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table", "{out}", "--against", "shira"], "no result is of 'shira': there are 'lora'"),
        (["plot", "{out}", "--out", "{folder}"], "plots need matplotlib: pip install peft-sparsegrad[plot]"),
        (["table", "{folder}/none.jsonl"], "cannot read "),
        (["table", "{folder}/empty.jsonl"], "there is no result in "),
    ],
)
def test_what_cannot_be_done_is_one_sentence(tmp_path, capsys, monkeypatch, arguments, message):
    out = write(tmp_path / "out.jsonl", {(1, 0): 0.5})
    (tmp_path / "empty.jsonl").touch()
    original = builtins.__import__

    def without_matplotlib(name, *rest):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    assert main([each.format(out=out, folder=tmp_path) for each in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_a_task_that_would_lead_to_another_folder_is_refused(tmp_path, capsys):
    out = write(tmp_path / "out.jsonl", {(1, 0): 0.5}, task="../x")
    assert main(["plot", str(out), "--out", str(tmp_path / "plots")]) == 2
    assert "line 1 is no result of this benchmark: there is no task '../x'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [out]


def test_the_results_in_the_repository_can_be_read():
    for path in (ROOT / "docs/results").glob("*.jsonl"):
        if path.name.startswith("glue"):
            assert report(read_results(path, GlueRun))
        elif path.name == "crosslingual.jsonl":
            assert read_results(path, CrosslingualRun)
        elif path.name.startswith("frontier_costs"):
            assert measured_methods(path)
        elif path.name == "energy.jsonl":
            assert table_of_energy(read_json_lines(path))
        elif path.name == "table6_smollm2.jsonl":
            assert all(run["validation_loss_after"] for run in read_json_lines(path))
        elif path.name.startswith("frontier"):
            assert read_results(path, FrontierRun)
        else:
            assert series_of(read_results(path, Run))
