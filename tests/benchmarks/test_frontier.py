"""The frontier's runner on tiny models: every method trains, and an interrupted run goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from frontier_files import write_files
from torch.nn.functional import cross_entropy

from benchmarks.frontier.__main__ import main
from benchmarks.frontier.batches import batch_order
from benchmarks.frontier.chat import collate, label_loss
from benchmarks.frontier.conversations import split_by_tree
from benchmarks.frontier.methods import METHODS, Method
from benchmarks.frontier.runs import Plan, Run
from benchmarks.frontier.train import Workplace, attach, execute, rate_at
from experiments.results import read_results
from peft_sparsegrad import SparseGradConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_files(tmp_path_factory.mktemp("frontier"))


@pytest.fixture(scope="module")
def workplaces(folder) -> dict[str, Workplace]:
    models = {"smollm2": "llama", "cola": "bert"}
    return {task: Workplace(folder / model, folder, CPU, "float32") for task, model in models.items()}


def short(method: Method) -> Method:
    """A method whose warm-up and blocks suit models of 32 dimensions."""
    few = {"warmup_steps": 2} if method.config is SparseGradConfig else {}
    blocks = {"block_size": 16} if "block_size" in method.settings else {}
    return Method(**{**vars(method), "settings": {**method.settings, **few, **blocks}})


KINDS = {(method.family, tuple(method.settings)): name for name, method in METHODS.items()}.values()


@pytest.mark.parametrize(
    ("name", "task"), [(name, ("smollm2", "cola")[number % 2]) for number, name in enumerate(KINDS)]
)
def test_each_method_trains_its_own_values_and_the_head_alone(name, task, workplaces, monkeypatch):
    place = workplaces[task]
    monkeypatch.setitem(METHODS, name, short(METHODS[name]))
    run = Plan("m", (task,), (name,), (0,), steps=8, batch_size=2, precision="float32").run(task, name, 0, 1e-3)
    fresh, record = attach(place, run), execute(place, run)
    trained = sum(p.numel() for p in fresh.parameters() if p.requires_grad)
    assert record["trained_parameters"] + record["trained_head_parameters"] == trained
    assert (record["trained_head_parameters"] > 0) == (task == "cola")
    assert math.isfinite(record["score"])
    assert math.isfinite(record["search_score"])
    if name == "frozen":
        assert record["trained_parameters"] == 0
    else:
        assert record["after"]["search_loss"] != record["before"]["search_loss"]
    assert 0 <= record["warmup_passes"] < 8 == record["passes"]
    assert (record["warmup_worth"] is None) == (record["warmup_passes"] == 0)
    assert (record["warmup_worth"] or 0) >= record["warmup_passes"]


def test_the_default_is_among_the_methods():
    assert METHODS["SparseGrad 1%, warm-up of 6"].settings == {"warmup_steps": SparseGradConfig().warmup_steps}


def test_the_loss_is_that_of_the_models_own_labels(workplaces):
    model = workplaces["smollm2"].fresh_model("smollm2", 0).eval()
    rows = [{"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6]}, {"input_ids": [7, 8], "labels": [-100, 8]}]
    logits = [model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].double() for row in rows]
    labels = torch.cat([torch.tensor(row["labels"][1:]) for row in rows])
    expected = cross_entropy(torch.cat(logits), labels)  # ignores -100
    assert label_loss(model, collate(rows)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_no_tree_is_in_two_splits_and_every_path_is_in_one(folder):
    split = split_by_tree(folder)
    parts = [{path[0]["content"] for path in part} for part in (split.train, split.search, split.final)]
    assert [len(part) for part in parts] == [8, 1, 1]
    assert len(set.union(*parts)) == 10
    assert sorted(len(path) for path in split.search) == [2, 4]
    assert all(path[-1]["role"] == "assistant" for path in split.train)


def test_batches_are_full_and_each_epoch_has_each_row_once():
    order = batch_order([3, 1, 2, 5, 4, 6], batch_size=2, steps=6, seed=0)
    assert sorted(row for rows in order[:3] for row in rows) == list(range(6))
    assert order == batch_order([3, 1, 2, 5, 4, 6], batch_size=2, steps=6, seed=0)
    assert order != batch_order([3, 1, 2, 5, 4, 6], batch_size=2, steps=6, seed=1)


def test_the_learning_rate_rises_and_falls():
    rates = [rate_at(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 6)
    assert rates[5] == rates[6] == 1
    assert rates[7:] == sorted(rates[7:], reverse=True)
    assert 0 < rates[-1] < 0.001


def done(plan: Plan, best: float) -> dict[Run, dict]:
    """Do what is missing until nothing is; the nearer a rate to `best`, the better its score."""
    results = {}
    while missing := next(plan.missing(results), None):
        results[missing] = {"search_score": -abs(math.log(missing.lr / best))}
    return results


def test_the_search_goes_on_beyond_an_edge_and_all_seeds_run_at_the_best_rate():
    plan = Plan("m", ("smollm2",), ("LoRA r=8",), (0, 1, 2), steps=1, batch_size=1, precision="float32")
    inside, below, far_above = (done(plan, best) for best in (1e-3, 4e-4, 1.0))
    assert {run.lr for run in inside} == {4e-4, 1e-3, 2.5e-3}
    assert {run.lr for run in below} == {1.6e-4, 4e-4, 1e-3, 2.5e-3}
    assert {run.lr for run in far_above} == {4e-4, 1e-3, 2.5e-3, 6.3e-3, 1.6e-2}
    for results, best in ((inside, 1e-3), (below, 4e-4), (far_above, 1.6e-2)):
        assert {run.seed for run in results if run.lr == best} == {0, 1, 2}
        assert all(run.seed == 0 for run in results if run.lr != best)


def test_rates_that_are_given_are_run_with_all_seeds_and_no_others():
    plan = Plan("m", ("smollm2",), ("LoRA r=8",), (0, 1), 1, 1, precision="float32", rates=(2e-3, 5e-3))
    assert {(run.lr, run.seed) for run in done(plan, best=1.0)} == {
        (lr, seed) for lr in (2e-3, 5e-3) for seed in (0, 1)
    }


def test_an_interrupted_campaign_goes_on_and_is_drawn(folder, tmp_path, capsys):
    out, costs = tmp_path / "runs.jsonl", tmp_path / "costs.jsonl"
    common = ["--task", "smollm2", "--model", str(folder / "llama"), "--data", str(folder), "--steps", "3"]
    common += ["--batch-size", "2", "--device", "cpu", "--methods", "frozen", "LoRA r=2"]
    assert main(["run", *common, "--out", str(out), "--seeds", "0", "1"]) == 0
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:-1]) + lines[-1][:50])
    assert main(["run", *common, "--out", str(out), "--seeds", "0", "1"]) == 0
    assert len(read_results(out, Run)) == len(lines)
    again = [json.loads(line)["score"] for line in (lines[-1], out.read_text().splitlines()[-1])]
    assert again[0] == pytest.approx(again[1], rel=1e-6)
    assert main(["costs", *common, "--out", str(costs), "--rounds", "1"]) == 0
    capsys.readouterr()
    assert main(["table", str(out), "--costs", str(costs)]) == 0
    table = capsys.readouterr().out
    (row,) = [line for line in table.splitlines() if line.startswith("| LoRA r=2")]
    assert "±" in row
    assert "another machine" not in table
    elsewhere = tmp_path / "elsewhere.jsonl"
    elsewhere.write_text(costs.read_text().replace('"device": "cpu"', '"device": "a GPU"'))
    assert main(["table", str(out), "--costs", str(elsewhere)]) == 0
    assert "are from another machine, a GPU: only their ratios" in capsys.readouterr().out
    on_two = "".join(
        line.replace('"device": "cpu"', '"device": "a GPU"') if "LoRA r=2" in line else line
        for line in out.read_text().splitlines(keepends=True)
    )
    elsewhere.write_text(on_two)
    assert main(["table", str(elsewhere)]) == 0
    table = capsys.readouterr().out
    assert "‡ ran on a GPU, where the base model's score differs by +0.0000." in table
    assert [line.split(" | ")[0] for line in table.splitlines() if "‡ |" in line] == ["| LoRA r=2‡"]
    assert main(["plot", str(out), "--costs", str(costs), "--out", str(tmp_path)]) == 0
    assert {path.suffix for path in tmp_path.glob("frontier_llama.*")} == {".png", ".svg"}


@pytest.mark.slow
def test_processes_that_share_the_device_do_what_one_does(folder, tmp_path):
    common = ["run", "--task", "cola", "--model", str(folder / "bert"), "--data", str(folder), "--steps", "4"]
    common += ["--batch-size", "2", "--device", "cpu", "--methods", "LoRA r=2", "full", "--seeds", "0"]
    results = []
    for number in (1, 2):
        out = tmp_path / f"{number}.jsonl"
        assert main([*common, "--workers", str(number), "--out", str(out)]) == 0
        results.append(read_results(out, Run))
    assert results[0].keys() == results[1].keys()
    for run, record in results[0].items():
        assert record["training_loss"] == pytest.approx(results[1][run]["training_loss"], rel=1e-5)


def test_wrong_input_is_said_in_one_line(folder, tmp_path, capsys):
    options = ["--data", str(folder), "--out", str(tmp_path / "x.jsonl"), "--device", "cpu"]
    assert main(["run", "--task", "smollm2", "--model", str(tmp_path), *options]) == 2
    assert "config.json" in capsys.readouterr().err
    assert main(["run", "--task", "smollm2", "cola", "--model", str(folder / "llama"), *options]) == 2
    assert "model of its own" in capsys.readouterr().err
