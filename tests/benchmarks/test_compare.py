"""The comparison of methods on a real model, `python -m benchmarks.compare`, on a tiny one."""

from __future__ import annotations

import csv
import json
import random
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fresh import run_program
from tiny import bert, tokenizer
from transformers import TrainerCallback

from benchmarks.compare.__main__ import main, parse_arguments, runs_of
from benchmarks.compare.batches import LengthWindows
from benchmarks.compare.recording import RecordingTrainer
from benchmarks.compare.runs import Run
from benchmarks.compare.tasks import TASKS
from benchmarks.compare.train import build_model, execute
from experiments.methods import METHODS
from experiments.results import finished_runs, read_results

MLP = 2 * (32 * 64 + 64 + 64 * 32 + 32)
POOLER = 32 * 32 + 32
HEAD = {"cola": POOLER + 2 * 32 + 2, "stsb": POOLER + 32 + 1}
MEASURED = {
    *("run", "evaluations", "last_training_loss", "trained_parameters", "trained_head_parameters", "adapter_bytes"),
    *("steps", "seconds_per_step", "warmup_seconds", "seconds", "kept_memory", "peak_memory", "data_order"),
    "environment",
}


OLD = """{"run": {"model": "m", "task": "cola", "method": "full", "seed": 0, "lr": 0.1, "density": 0.01, "epochs": 1, \
"train_rows": 8, "batch_size": 4}, "epochs": []}
"""


def write_data(folder: Path) -> None:
    """CoLA's tab-separated columns, where a quotation mark means nothing, and STS-B's quoted, comma-separated ones."""
    rng = random.Random(0)
    for split, count in {"train": 30, "dev": 11}.items():
        texts = [" ".join(f"t{rng.randrange(3, 64)}" for _ in range(rng.randrange(2, 9))) for _ in range(count)]
        for task, suffix in {"cola": "tsv", "stsb": "csv"}.items():
            (folder / task).mkdir(parents=True, exist_ok=True)
            with (folder / task / f"{task}_{split}.{suffix}").open("w", encoding="utf-8", newline="") as file:
                if task == "cola":
                    file.writelines(f'gj04\t{i % 2}\t{"*" * (1 - i % 2)}\t"{text}\n' for i, text in enumerate(texts))
                else:
                    csv.writer(file).writerows((f"{text}, {text}", text, i % 11 / 2) for i, text in enumerate(texts))


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> SimpleNamespace:
    """Eight runs that a user's command has done: its arguments, what it printed, the file."""
    folder = tmp_path_factory.mktemp("compare")
    bert().bert.save_pretrained(folder / "model")  # without a head, as checkpoints come
    tokenizer().save_pretrained(folder / "model")
    write_data(folder / "data")
    where = ["run", "--model", str(folder / "model"), "--data", str(folder / "data")]
    what = ["--methods", "full", "lora", "--seeds", "0", "1", "--lrs", "1e-3"]
    sizes = ["--epochs", "2", "--train-rows", "14", "--batch-size", "4", "--head-steps", "2", "--max-eval-rows", "9"]
    arguments, out = [*where, *what, *sizes], folder / "results.jsonl"
    done = run_program("-m", "benchmarks.compare", *arguments, "--out", out)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(arguments=arguments, out=out, printed=done.stdout, data=folder / "data")


def test_every_run_is_a_line_with_all_that_was_measured(compared):
    records = [json.loads(line) for line in compared.out.read_text().splitlines()]
    assert len({Run(**record["run"]) for record in records}) == len(records) == 2 * 2 * 2
    assert compared.printed.count(" s per step") == 8
    for record in records:
        method, head = record["run"]["method"], HEAD[record["run"]["task"]]
        assert set(record) == MEASURED
        assert [scores["step"] for scores in record["evaluations"]] == [3, 5, 8]
        assert all(np.isfinite([scores["metric"], scores["loss"]]).all() for scores in record["evaluations"])
        assert record["steps"] == 2 * 4  # 14 rows are 4 batches
        assert record["trained_head_parameters"] == head
        assert record["seconds"] > record["steps"] * record["seconds_per_step"] / 2 > 0
        if method == "full":
            assert record["trained_parameters"] == MLP
            assert record["adapter_bytes"] == 4 * (MLP + head)
        else:
            values = record["trained_parameters"] + head
            assert 0 < record["trained_parameters"] < MLP / 10
            assert 4 * values < record["adapter_bytes"] < 4 * values + 10_000


def test_a_second_call_does_nothing(compared, capsys):
    before = compared.out.read_bytes()
    assert main([*compared.arguments, "--out", str(compared.out)]) == 0
    assert "0 of 8 runs to do" in capsys.readouterr().out
    assert compared.out.read_bytes() == before


@pytest.mark.parametrize("lost", [1, 40], ids=["the newline", "more"])
def test_a_half_written_line_is_cut_off_and_its_run_done_again(compared, tmp_path, capsys, lost):
    out = tmp_path / "results.jsonl"
    out.write_bytes(compared.out.read_bytes()[:-lost])
    assert main([*compared.arguments, "--out", str(out)]) == 0
    assert "1 of 8 runs to do" in capsys.readouterr().out
    before, after = (path.read_text().splitlines() for path in (compared.out, out))
    assert after[:-1] == before[:-1]
    first, again = json.loads(before[-1]), json.loads(after[-1])
    assert again["run"] == first["run"]
    for old, new in zip(first["evaluations"], again["evaluations"], strict=True):
        assert new == pytest.approx(old, abs=1e-5)


def test_a_seed_means_the_same_data_for_every_method(compared):
    orders: dict[tuple, set[str]] = {}
    for run, record in read_results(compared.out, Run).items():
        orders.setdefault((run.task, run.seed), set()).add(record["data_order"])
    assert len(orders) == 4
    assert all(len(order) == 1 for order in orders.values())  # of full and lora
    assert len(set.union(*orders.values())) == 4


@pytest.mark.parametrize("head_steps", [0, 2])
def test_a_seed_means_the_same_head_for_every_method(compared, head_steps):
    run = replace(some_run(compared, "lora"), head_steps=head_steps)
    head = head_of(run, compared.data)
    for method in ("full", "sparsegrad"):
        assert torch.equal(head_of(replace(run, method=method), compared.data), head)
    assert not torch.equal(head_of(replace(run, seed=1), compared.data), head)


def some_run(compared, method: str) -> Run:
    return next(
        run
        for run in finished_runs(compared.out, Run)
        if run.method == method and run.seed == 0 and run.task == "cola"
    )


def head_of(run: Run, data: Path) -> torch.Tensor:
    model = build_model(run, data)
    return next(p for name, p in model.named_parameters() if "classifier" in name and p.requires_grad)


def test_only_the_head_is_settled_and_it_learns(compared, tmp_path):
    run = replace(some_run(compared, "full"), task="stsb", head_steps=40)
    before, after = (dict(build_model(each, compared.data).named_parameters()) for each in (run_without(run), run))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "classifier" in name or "pooler" in name}
    losses = [training_loss(model_of, run, compared.data) for model_of in (run_without(run), run)]
    assert losses[1] < losses[0] - 0.5


def run_without(run: Run) -> Run:
    return replace(run, head_steps=0)


def training_loss(model_run: Run, run: Run, data: Path) -> float:
    """Mean loss on all training rows, which are what the head learns from where there are no others."""
    rows = TASKS[run.task].rows(data, "train", tokenizer())
    return build_model(model_run, data)(**TASKS[run.task].collator(tokenizer())(rows)).loss.item()


def test_the_trainer_takes_that_order_and_another_one_in_each_epoch(compared, monkeypatch):
    seen = []
    monkeypatch.setattr(LengthWindows, "__iter__", lambda self: seen.append(self.epoch) or iter(range(len(self))))
    execute(replace(some_run(compared, "full"), head_steps=0), compared.data)
    assert seen == [0, 1]


def test_settings_reach_the_method_and_its_name(compared):
    run = replace(some_run(compared, "lora"), method="sparsegrad", settings='{"rank": 7, "support_score": "energy"}')
    config = build_model(run, compared.data).peft_config["default"]
    assert (config.rank, config.support_score) == (7, "energy")
    assert run.label == "sparsegrad, rank 7, support_score energy"
    assert some_run(compared, "lora").label == "lora"


def test_settings_are_runs_of_their_own(compared):
    runs = runs_of(parse_arguments([*compared.arguments, "--settings", '{"b": 1, "a": 2}', '{"a": 2, "b": 1}', "{}"]))
    assert {run.settings for run in runs} == {'{"a": 2, "b": 1}', "{}"}
    assert len(runs) == 2 * 8


def test_bf16_trains_in_mixed_precision_and_keeps_less(compared):
    run = some_run(compared, "full")
    record = execute(replace(run, precision="bf16"), compared.data)
    full = read_results(compared.out, Run)[run]
    assert record["kept_memory"] < full["kept_memory"]
    losses = [each["evaluations"][-1]["loss"] for each in (record, full)]
    assert losses[0] == pytest.approx(losses[1], abs=0.05)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("method", ["shira", "supertuning", "sparsegrad-dynamic", "anneal-graddrop", "graddrop-epoch"])
def test_every_kind_of_method_can_be_run_and_measured(compared, method):
    run = replace(some_run(compared, "full"), method=method, density=0.05)
    record, full = execute(run, compared.data), read_results(compared.out, Run)[some_run(compared, "full")]
    assert record["data_order"] == full["data_order"]
    assert 0 < record["kept_memory"] < record["peak_memory"]
    assert set(record) == MEASURED - {"run"}


def test_the_warm_up_comes_before_the_steps_that_are_counted(compared, caplog):
    run = replace(some_run(compared, "full"), method="sparsegrad", density=0.05)
    execute(run, compared.data)
    assert "warm-up is done" in caplog.text
    assert "of training, because" not in caplog.text


def test_measuring_changes_nothing(compared, monkeypatch):
    run, saved = replace(some_run(compared, "full"), lr=0.1), []
    original = RecordingTrainer.measure_memory

    def watched(trainer):
        saved.extend(parameter.detach().clone() for parameter in trainer.model.parameters())
        measured = original(trainer)
        assert all(map(torch.equal, saved, trainer.model.parameters()))
        return measured

    monkeypatch.setattr(RecordingTrainer, "measure_memory", watched)
    execute(run, compared.data)
    assert saved


def test_memory_of_a_step_counts_weights_gradients_and_what_is_kept(compared):
    run = some_run(compared, "full")
    parameters = sum(p.numel() for p in build_model(run_without(run), compared.data).parameters())
    records = read_results(compared.out, Run)
    full, lora = records[run], records[some_run(compared, "lora")]
    trained = full["trained_parameters"] + full["trained_head_parameters"]
    assert full["peak_memory"] > 4 * (parameters + 3 * trained)  # weights; gradients and AdamW's two averages
    assert full["peak_memory"] > lora["peak_memory"] > 4 * parameters
    assert 0 < full["kept_memory"] < full["peak_memory"]


class Troublemaker(TrainerCallback):
    """Disturbs the random numbers, and takes its time at the end of a step."""

    def on_init_end(self, *args, **kwargs):
        torch.manual_seed(99)

    def on_train_begin(self, *args, **kwargs):
        time.sleep(0.1)

    def on_step_end(self, *args, **kwargs):
        torch.rand(7)
        time.sleep(0.05)


def test_callbacks_of_a_method_count_in_its_time_and_leave_the_data_alone(compared, monkeypatch):
    run, record = next(
        (run, record) for run, record in read_results(compared.out, Run).items() if run.method == "full"
    )
    monkeypatch.setitem(METHODS, "slow", replace(METHODS["full"], make_callbacks=lambda: [Troublemaker()]))
    slow = execute(replace(run, method="slow"), compared.data)
    assert slow["data_order"] == record["data_order"]
    assert slow["seconds_per_step"] > 0.05
    assert slow["warmup_seconds"] > 0.1 > record["warmup_seconds"]


def test_shards_share_the_runs_and_keep_them(compared):
    shards = [runs_of(parse_arguments([*compared.arguments, "--shard", text])) for text in ("0/3", "1/3", "2/3")]
    everything = runs_of(parse_arguments(compared.arguments))
    assert [len(shard) for shard in shards] == [3, 3, 2]
    assert set().union(*shards) == set(everything) == finished_runs(compared.out, Run)


def test_missing_data_is_one_sentence(compared, tmp_path):
    write_data(tmp_path)
    (tmp_path / "stsb/stsb_dev.csv").unlink()
    out = tmp_path / "results.jsonl"
    done = run_program("-m", "benchmarks.compare", *compared.arguments, "--data", tmp_path, "--out", out)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    reason = f"error: cannot read {tmp_path}/stsb/stsb_dev.csv: No such file or directory; --data is the folder above"
    assert done.stderr.splitlines()[-1].startswith(reason)
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("cola/cola_dev.tsv", "gj04\t1\t\tt3 t4\ngj04\tx\t\tt3\n", "cola_dev.tsv, row 2 is not in the format of cola"),
        ("cola/cola_dev.tsv", "", "cola_dev.tsv is empty"),
        ("stsb/stsb_dev.csv", "t3,t4\n", "stsb_dev.csv, row 1 is not in the format of stsb"),
        ("stsb/stsb_train.csv", "t3,t4,2.5\n", "stsb has 1 training rows, and --train-rows asks for 14"),
        ("results.jsonl", '{"run": 1}\n', "results.jsonl, line 1 is no result of this benchmark"),
        ("results.jsonl", OLD, "line 1 is no result of this benchmark: it lacks evals, head_steps, max_eval_rows"),
    ],
)
def test_wrong_input_is_one_sentence(compared, tmp_path, capsys, name, text, message):
    write_data(tmp_path)
    (tmp_path / name).write_text(text)
    assert main([*compared.arguments, "--data", str(tmp_path), "--out", str(tmp_path / "results.jsonl")]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--settings", '{"rank": 7}'], "full cannot be given --settings '{\"rank\": 7}': "),
        (["--methods", "sparsegrad", "--settings", '{"rank": -7}'], "`rank` must be a positive int"),
        (["--evals", "9"], "there are 8 steps, and --evals asks for 9 evaluations"),
        (["--max-eval-rows", "12"], "cola has 11 dev rows, and --max-eval-rows asks for 12"),
    ],
)
def test_options_that_cannot_be_used_are_one_sentence(compared, tmp_path, capsys, options, message):
    assert main([*compared.arguments, *options, "--out", str(tmp_path / "results.jsonl")]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "results.jsonl").exists()


def test_a_quotation_mark_belongs_to_the_sentence_in_cola_and_a_comma_in_stsb(compared):
    sentence, label = TASKS["cola"].load(compared.data, "dev")[1]
    (first, second), score = TASKS["stsb"].load(compared.data, "dev")[1]
    assert (sentence, label) == ((f'"{second}',), 1)
    assert (first, score) == (f"{second}, {second}", 0.5)
