"""`python -m benchmarks.crosslingual`: a tiny encoder on made-up topics and parts of speech, and its tables."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from fresh import ROOT, environment

from benchmarks.crosslingual.__main__ import main, parse_arguments
from benchmarks.crosslingual.arguments import plan_of
from benchmarks.crosslingual.plan import Plan
from benchmarks.crosslingual.series import best_rate, load, series_of
from benchmarks.crosslingual.table import difference_rows, tables
from benchmarks.crosslingual.workers import carry_out
from examples.xglue import tiny_encoder
from examples.xglue.runs import Run
from examples.xglue.tasks import TASKS
from experiments.results import append_result, read_results
from peft_sparsegrad.cli.errors import InputError

WORDS = ("red", "blue", "green", "tall", "small", "old", "new", "warm")
PROGRAM = [sys.executable, "-m", "benchmarks.crosslingual"]
PLAIN, EPOCH = "graddrop-off", "graddrop-epoch"


def write_data(folder: Path) -> None:
    """Files of SIB-200 and UD in English and Hindi."""
    rng = random.Random(0)
    for task in (TASKS["SIB-200"], TASKS["UD"]):
        for split, language, rows in (("train", "en", 8), ("dev", "en", 4), ("test", "en", 4), ("test", "hi", 4)):
            path = folder / task.file(split, language)  # pyright: ignore
            path.parent.mkdir(parents=True, exist_ok=True)
            words = [rng.choices(WORDS, k=5) for _ in range(rows)]
            if task.name == "UD":
                lines = ["".join(f"{i}\t{w}\t_\tADJ" + "\t_" * 6 + "\n" for i, w in enumerate(row)) for row in words]
                path.write_text("\n".join(lines))
            else:
                lines = [f"{i}\t{task.labels[i % 7]}\t{' '.join(row)}" for i, row in enumerate(words)]
                path.write_text("\n".join(["index_id\tcategory\ttext", *lines]) + "\n")


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    """Of a search over two rates, and two seeds at the better one."""
    data, model = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("encoder")
    write_data(data)
    tiny_encoder.main(["--data", str(data), "--out", str(model)])
    given = f"run --model {model} --data {data} --languages en hi --lrs 1e-3 1e-2 --seeds 2 --epochs 2 --batch-size 4"
    return [*given.split(), "--max-length", "16"]


def plan(*options: str) -> Plan:
    return plan_of(parse_arguments(options))


def test_searches_trains_more_seeds_and_goes_on_where_it_was_killed(options, tmp_path, capsys):
    """The second start finds two whole lines and a part of the third."""
    out = tmp_path / "results.jsonl"
    options = [*options, "--methods", PLAIN, EPOCH, "--tasks", "SIB-200", "UD", "--out", str(out)]
    assert main([*options, "--methods", PLAIN, "--tasks", "SIB-200"]) == 0
    first = out.read_bytes()
    lines = first.splitlines(keepends=True)
    assert len(lines) == 2 + 1
    out.write_bytes(b"".join(lines[:2]) + lines[2][:40])
    assert main(options) == 0
    results = read_results(out, Run)
    assert len(results) == 2 * 2 * 3
    assert out.read_bytes().startswith(b"".join(lines[:2]))
    assert [(run.seed, run.lr) for run in list(results)[:2]] == [(0, 1e-3), (0, 1e-2)]
    again = json.loads(lines[2])["epochs"]
    assert again == json.loads(out.read_bytes().splitlines()[2])["epochs"], "the same run has the same scores"
    for record in results.values():
        (epoch,) = record["epochs"]
        assert set(epoch["scores"]) == {"en", "hi", "english dev"}
        assert epoch["step"] == 2 * 2
    capsys.readouterr()
    assert main(["table", str(out), "--figure", str(tmp_path / "difference.png")]) == 0
    text = capsys.readouterr().out
    assert "### SIB-200" in text
    assert "tested in en, hi; low-resource: hi." in text
    assert "| graddrop-epoch | 2 |" in text
    assert (tmp_path / "difference.png").stat().st_size > 1000


def made_up(plan: Plan, scores: dict[tuple[str, int, float], float]) -> dict:
    """Results of the plan's first task: the score in English, and half of it in Hindi."""
    results = {}
    for (method, seed, lr), value in scores.items():
        run = replace(plan.search(method, plan.tasks[0])[0], seed=seed, lr=lr)
        by_language = {"en": value, "hi": value / 2, "english dev": value + 100 * lr}
        results[run] = {
            "epochs": [{"scores": {name: {"accuracy": x} for name, x in by_language.items()}}],
            "seconds": 1,
        }
    return results


def test_the_next_run_is_decided_from_the_results(options):
    it = plan(*options, "--methods", PLAIN, EPOCH, "--tasks", "SIB-200", "--seeds", "3")
    first, second = it.search(PLAIN, "SIB-200")
    assert (first.lr, second.lr) == (1e-3, 1e-2)
    assert it.next_run({}, []) == first
    assert it.next_run({}, [first]) == second
    others = it.search(EPOCH, "SIB-200")
    assert it.next_run({}, [first, second]) == others[0], "the better rate is not known yet, and nobody waits for it"
    done = made_up(it, {(PLAIN, 0, 1e-3): 60, (PLAIN, 0, 1e-2): 50})
    assert it.next_run(done, []) == replace(first, seed=1)
    assert it.next_run(done, [replace(first, seed=1)]) == replace(first, seed=2)
    done |= made_up(it, {(PLAIN, 1, 1e-3): 0, (PLAIN, 2, 1e-3): 0})
    assert it.next_run(done, others) is None, "the search's seeds alone decide: 1 and 2 do not bring the other rate"
    assert it.longest == 2 * (2 + 2)


def test_rates_that_are_level_are_decided_for_the_lower_one():
    rates = {lr: {0: {"epochs": [{"scores": {"english dev": {"accuracy": 50.0}}}]}} for lr in (1e-4, 2e-4)}
    assert best_rate(rates, "SIB-200") == 1e-4


def test_differences_are_paired_by_seed(options):
    """Of 1, 2 and 3 points: mean 2, standard error 1/√3, and Student's t for 2 degrees of freedom is 4.303."""
    it = plan(*options, "--methods", PLAIN, EPOCH, "--tasks", "SIB-200")
    scores = {(PLAIN, seed, 1e-3): 50 + 10 * seed for seed in range(4)}
    scores |= {(EPOCH, seed, 1e-3): 51 + 11 * seed for seed in range(3)}
    results = made_up(it, scores)
    (row,) = difference_rows(series_of(results), PLAIN)
    assert row[:4] == [EPOCH, "3", "+2.00 (-0.48 to +4.48)", "level"]
    assert row[4:6] == ["+1.50 (-0.36 to +3.36)", "level"], "all languages: of English and half of it"
    assert row[6:] == ["+1.00 (-0.24 to +2.24)", "level"], "low-resource: Hindi"
    assert "| graddrop-off | 0.001 | the only one | 4 | 65.00 ± 12.91 |" in tables(results, PLAIN)


def test_results_of_other_settings_are_not_compared(options, tmp_path):
    it = plan(*options, "--methods", PLAIN, "--tasks", "SIB-200")
    ((run, record),) = made_up(it, {(PLAIN, 0, 1e-3): 50}).items()
    path = tmp_path / "results.jsonl"
    append_result(path, run, record)
    append_result(path, replace(run, seed=1, epochs=9), record)
    with pytest.raises(InputError, match="cannot be compared: they differ in epochs"):
        load([path])
    assert asdict(run)["languages"] == ("en", "hi")


def test_a_run_that_fails_is_named_and_the_others_go_on(options, tmp_path, capsys):
    """Its model is gone when it begins: what happens to a worker, not to the options, which are checked before."""
    it = plan(*options, "--methods", PLAIN, "--tasks", "SIB-200", "UD", "--seeds", "1", "--lrs", "1e-3")
    broken = {**it.common, "SIB-200": {**it.common["SIB-200"], "model": str(tmp_path / "gone")}}
    assert not carry_out(replace(it, common=broken), tmp_path / "results.jsonl", 1, 60)
    assert "failed: SIB-200 graddrop-off seed 0 at 0.001: InputError" in capsys.readouterr().err
    assert [run.task for run in read_results(tmp_path / "results.jsonl", Run)] == ["UD"]


def test_no_run_is_started_that_would_not_end_in_time(options, tmp_path):
    it = plan(*options, "--methods", PLAIN, "--tasks", "SIB-200")
    ((run, record),) = made_up(it, {(PLAIN, 0, 1e-3): 50}).items()
    append_result(tmp_path / "results.jsonl", run, {**record, "seconds": 55})
    assert carry_out(it, tmp_path / "results.jsonl", 1, 1.0), "66 seconds, with the margin, are more than a minute"
    assert len(read_results(tmp_path / "results.jsonl", Run)) == 1


def test_options_that_do_not_fit_are_refused(options):
    with pytest.raises(InputError, match="--search-seeds 3 are more than --seeds 2"):
        plan(*options, "--search-seeds", "3")
    with pytest.raises(InputError, match="SIB-200 has none of the languages xx"):
        plan(*options, "--languages", "xx")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="--device cuda, but torch uses cpu here"):
            plan(*options, "--device", "cuda")


@pytest.mark.slow
def test_worker_processes_do_the_runs_of_one_process(options, tmp_path):
    options = [*options, "--methods", PLAIN, "--tasks", "SIB-200", "--out"]
    command = [*PROGRAM, *options, str(tmp_path / "two.jsonl"), "--workers", "2"]
    subprocess.run(command, check=True, cwd=ROOT, env=environment())
    assert main([*options, str(tmp_path / "one.jsonl")]) == 0
    two, one = (read_results(tmp_path / f"{name}.jsonl", Run) for name in ("two", "one"))
    assert {run: record["epochs"] for run, record in two.items()} == {run: one[run]["epochs"] for run in one}
