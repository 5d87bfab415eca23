"""Tables, tests and figures of results, and the program that makes them."""

from __future__ import annotations

import io
import json
import math
import statistics
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from fresh import run_program
from matplotlib.image import imread

from examples.xglue.comparison import fractional_gains, gains, paired_test, understanding_scores
from examples.xglue.figures import epoch_figure, gain_figure, t_figure
from examples.xglue.report import main, paired_tests
from examples.xglue.runs import Run
from examples.xglue.scores import load_results
from examples.xglue.tables import language_table, score_table, significance_table, task_table
from examples.xglue.tasks import TASKS
from experiments.results import append_result, read_results
from peft_sparsegrad.cli.errors import InputError

BASELINE = "graddrop-off"
RUN = Run(
    **{"model": "folder/encoder", "data": "data", "task": "QAM", "method": BASELINE, "seed": 0, "split": "test"},
    **{"languages": ("en", "de"), "epochs": 2, "lr": 1e-5, "batch_size": 32, "max_length": 64, "max_rows": 0},
    **{"dropout": 0.0, "embeddings": "frozen", "blocks_per_epoch": 0},
    **{"density": 0.01, "target_modules": (), "precision": "float32"},
)


def add(path: Path, after_epochs: list[tuple[float, float, float]], **settings) -> None:
    """A result: for each epoch the scores in English, German and on the English dev set."""
    run = Run(**{**asdict(RUN), **settings})
    metric = TASKS[run.task].metric
    names = ("en", "de", "english dev")
    scores = [{name: {metric: value} for name, value in zip(names, epoch, strict=True)} for epoch in after_epochs]
    append_result(path, run, {"epochs": [{"epoch": i + 1, "scores": each} for i, each in enumerate(scores)]})


@pytest.fixture
def results(tmp_path) -> Path:
    """Two tasks, three methods and two seeds. GradDrop gains 3 and 1 points in the means of QAM, 1 and 2 of QADSM."""
    path = tmp_path / "results.jsonl"
    ends = {
        (BASELINE, "QAM"): [(60, 50), (62, 52)],
        ("graddrop", "QAM"): [(62, 54), (62, 54)],
        (BASELINE, "QADSM"): [(70, 60), (70, 60)],
        ("graddrop", "QADSM"): [(71, 61), (71, 63)],
        ("layer-graddrop", "QAM"): [(59, 49)],
    }
    for (method, task), seeds in ends.items():
        for seed, (english, german) in enumerate(seeds):
            add(path, [(90, 80, 75), (english, german, 70)], method=method, task=task, seed=seed)
    return path


def test_understanding_score_is_the_mean_over_tasks_of_the_mean_over_languages(results):
    loaded = load_results([results], BASELINE)
    assert understanding_scores(loaded, "graddrop", "last") == {0: (58 + 66) / 2, 1: (58 + 67) / 2}
    assert understanding_scores(loaded, "layer-graddrop", "last") == {}, "one of its tasks is missing"


def test_the_epoch_is_the_last_or_the_best_on_english_dev(results):
    loaded = load_results([results], BASELINE)["QAM"]
    assert loaded.average("graddrop", "last")[0] == 58
    assert loaded.average("graddrop", "best-dev")[0] == 85


def test_gains_are_paired_by_seed(results):
    loaded = load_results([results], BASELINE)
    assert gains(loaded["QAM"], "graddrop", BASELINE, "last") == {"en": 1.0, "de": 3.0}
    assert gains(loaded["QAM"], "layer-graddrop", BASELINE, "last") == {"en": -1.0, "de": -1.0}


def test_fractional_gains_are_shares_of_the_baselines_score(results, tmp_path):
    loaded = load_results([results], BASELINE)
    found = fractional_gains(loaded["QAM"], "graddrop", BASELINE, "last")
    assert found == pytest.approx({"en": 100 * 1 / 61, "de": 100 * 3 / 51})
    assert fractional_gains(loaded["QADSM"], "graddrop", BASELINE, "last")["de"] == pytest.approx(100 * 2 / 60)
    zero = tmp_path / "zero.jsonl"
    for method in (BASELINE, "graddrop"):
        add(zero, [(0, 50, 1), (0, 50, 1)], method=method)
    loaded = load_results([zero], BASELINE)
    found = fractional_gains(loaded["QAM"], "graddrop", BASELINE, "last")
    assert math.isnan(found["en"])
    assert found["de"] == 0
    assert gain_figure(loaded["QAM"], BASELINE, "last")


def test_t_test_is_over_the_tasks(results):
    """The differences are 2 (QAM) and 1.5 (QADSM): t = mean / (deviation / √2), and p is the Cauchy distribution's."""
    test = paired_test(load_results([results], BASELINE), "graddrop", BASELINE, "last")
    t = 1.75 / (statistics.stdev([2, 1.5]) / math.sqrt(2))
    assert test.tasks == 2
    assert (test.difference, test.statistic) == pytest.approx((1.75, t))
    assert test.p_value == pytest.approx(1 - 2 * math.atan(t) / math.pi)
    assert test.critical == pytest.approx(math.tan(math.pi * 0.475))


def test_no_t_without_two_tasks_or_without_spread(results, tmp_path):
    loaded = load_results([results], BASELINE)
    assert paired_test(loaded, "layer-graddrop", BASELINE, "last") is None
    same = tmp_path / "same.jsonl"
    for task in ("QAM", "QADSM"):
        add(same, [(60, 50, 70)], task=task)
        add(same, [(60.1, 50.1, 70)], task=task, method="graddrop")
    loaded = load_results([same], BASELINE)
    assert math.isnan(paired_test(loaded, "graddrop", BASELINE, "last").statistic)
    assert "| graddrop | 2 | +0.10 | – | – |" in significance_table(loaded, BASELINE, "last")
    assert paired_tests(loaded, BASELINE, "last") == {}


def test_tables(results):
    loaded = load_results([results], BASELINE)
    lines = task_table(loaded, BASELINE, "last").splitlines()
    assert lines[0] == "| method | seeds | QAM (accuracy) | QADSM (accuracy) | mean over QAM, QADSM |"
    assert lines[2] == f"| {BASELINE} | 2 | 56.00 ± 1.41 | 65.00 ± 0.00 | 60.50 ± 0.71 |"
    assert lines[3] == "| graddrop | 2 | **58.00 ± 0.00** | **66.50 ± 0.71** | **62.25 ± 0.35** |"
    assert lines[4] == "| layer-graddrop | 0 to 1 | 54.00 | – | – |"
    lines = language_table(loaded["QAM"], "last").splitlines()
    assert lines[0] == "| method | seeds | en | de | mean |"
    assert lines[3] == "| graddrop | 2 | **62.00 ± 0.00** | **54.00 ± 0.00** | **58.00 ± 0.00** |"


def test_methods_of_equal_means_are_all_in_bold():
    assert score_table(["x"], {"a": [[1.0, 2.0]], "b": [[1.5]], "c": [[]]}).splitlines()[2:] == [
        "| a | 2 | **1.50 ± 0.71** |",
        "| b | 1 | **1.50** |",
        "| c | 0 | – |",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "graddrop", "seed": 7, "lr": 1e-4}, "they differ in lr"),
        ({"method": "lora", "epochs": 3}, "they differ in epochs"),
        ({"method": "lora", "languages": ("en",)}, "they differ in languages"),
        ({"data": "elsewhere"}, "there are two results of QAM graddrop-off seed 0"),
        ({"task": "XNLI", "method": "lora"}, "XNLI has no result of the baseline 'graddrop-off'"),
    ],
)
def test_results_that_cannot_be_compared_are_named(results, settings, message):
    add(results, [(1, 2, 3)], **settings)
    with pytest.raises(InputError, match=message):
        load_results([results], BASELINE)


def test_methods_may_have_learning_rates_of_their_own(results):
    add(results, [(1, 2, 3)], method="lora", lr=1e-3)
    assert "lora" in load_results([results], BASELINE)["QAM"].epochs


def test_a_torn_last_line_is_left_out_and_written_over(results):
    whole = read_results(results, Run)
    with results.open("ab") as file:
        file.write(b'{"run": {"model"')
    assert read_results(results, Run) == whole
    add(results, [(1, 2, 3)], seed=9)
    assert len(read_results(results, Run)) == len(whole) + 1


@pytest.mark.parametrize("line", ["{}", "nonsense", '{"run": {}, "epochs": [1]}', '{"run": {}, "epochs": []}'])
def test_a_line_that_is_no_result_is_named(results, line):
    with results.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(InputError, match=r"results\.jsonl, line 10"):
        read_results(results, Run)


def pixels(png: bytes) -> np.ndarray:
    return imread(io.BytesIO(png))


def has_colour(image: np.ndarray, colour: str) -> bool:
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return bool((np.abs(image[..., :3] - rgb).max(axis=-1) < 0.01).any())


def test_figures_show_what_they_should(results):
    loaded = load_results([results], BASELINE)
    lines = pixels(epoch_figure(loaded["QAM"]))
    assert has_colour(lines, "#000000")
    assert has_colour(lines, "#0072B2"), "the first method after the baseline"
    assert has_colour(lines, "#D55E00"), "the second one"
    bars = pixels(t_figure(paired_tests(loaded, BASELINE, "last"), BASELINE))
    assert has_colour(bars, "#0072B2"), "a method above the baseline"
    assert not has_colour(bars, "#D55E00"), "none is below it"
    gain = pixels(gain_figure(loaded["QAM"], BASELINE, "last"))
    assert has_colour(gain, "#2d004b"), "the largest gain has the end of the scale"


def test_no_gain_figure_of_the_baseline_alone(tmp_path):
    add(tmp_path / "one.jsonl", [(1, 2, 3)])
    loaded = load_results([tmp_path / "one.jsonl"], BASELINE)
    assert gain_figure(loaded["QAM"], BASELINE, "last") is None


def test_report_writes_what_it_promises_and_the_same_again(results, tmp_path):
    out = tmp_path / "report"
    done = run_program("-m", "examples.xglue.report", results, "--out", out, "--epoch", "last")
    assert done.returncode == 0, done.stderr
    names = {
        "report.md",
        "t-test.png",
        *(f"{kind}-{task}.png" for kind in ("epochs", "gain") for task in ("QAM", "QADSM")),
    }
    assert {path.name for path in out.iterdir()} == names
    assert set(done.stdout.split()) == {str(out / name) for name in names}
    first = {name: (out / name).read_bytes() for name in names}
    text = first["report.md"].decode()
    assert "| graddrop | 2 | +1.75 | +7.00 | 0.090 |" in text
    assert all(f"]({name})" in text for name in names - {"report.md"})
    (out / "report.md.unfinished").write_text("cut short by a kill")
    assert main([str(results), "--out", str(out)]) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first


def test_results_of_several_files_go_into_one_report(results, tmp_path):
    other = tmp_path / "other.jsonl"
    add(other, [(61, 51, 70)], method="lora")
    assert main([str(results), str(other), "--out", str(tmp_path / "out"), "--epoch", "best-dev"]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| lora | 0 to 1 | 56.00 |" in text
    assert "the best score on the English dev set" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read .*No such file"), ("", "there is no finished run in .*none.jsonl")],
)
def test_report_without_results(content, message, tmp_path):
    path = tmp_path / "none.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        main([str(path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_named(results, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot make the folder .*file/report"):
        main([str(results), "--out", str(tmp_path / "file" / "report")])


def test_a_result_is_a_line_of_json(results):
    record = json.loads(results.read_text().splitlines()[0])
    assert record["run"]["task"] == "QAM"
    assert record["epochs"][1]["scores"]["de"] == {"accuracy": 50}
