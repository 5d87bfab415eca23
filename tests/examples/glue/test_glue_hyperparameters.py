"""Where a run's learning rate, batch size and number of values come from."""

import pytest

from examples.glue.hyperparameters import PRESETS, add_found, preset_of
from examples.glue.train import list_runs, main, parse_args
from experiments.terminal import run_and_exit


def runs_of(*arguments) -> list:
    return list_runs(
        parse_args(["--model", "bert-base-cased", "--tasks", "rte", "--seeds", "0", *map(str, arguments)])
    )


def test_where_the_hyperparameters_come_from(tmp_path):
    (run,) = runs_of("--methods", "lora")
    assert (run.batch_size, run.lr) == PRESETS["bert-base"]["rte"] == (16, 6.81e-5)
    (run,) = runs_of("--methods", "lora", "--preset", "roberta-large")
    assert (run.batch_size, run.lr) == (32, 1.02e-5)
    (run,) = runs_of("--methods", "lora", "--preset", "none", "--lr", "1e-4")
    assert (run.batch_size, run.lr) == (32, 1e-4)
    add_found(tmp_path / "found.json", {"task": "rte", "method": "lora", "batch_size": 8, "lr": 3e-3, "score": 0.5})
    lora, full = runs_of("--methods", "lora", "full", "--hyperparameters", tmp_path / "found.json")
    assert (lora.batch_size, lora.lr) == (8, 3e-3)
    assert (full.batch_size, full.lr) == (16, 6.81e-5)
    (run,) = runs_of("--methods", "lora", "--hyperparameters", tmp_path / "found.json", "--lr", "1e-4")
    assert (run.batch_size, run.lr) == (8, 1e-4)


def test_no_hyperparameters(capsys):
    with pytest.raises(SystemExit):
        run_and_exit(lambda: main(["--model", "m", "--tasks", "rte", "--preset", "none"]))
    assert "there is no learning rate for rte with full and m: give --lr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "preset"),
    [
        ("google-bert/bert-base-uncased", "bert-base"),
        ("FacebookAI/roberta-large/", "roberta-large"),
        ("models/roberta-base", "roberta-base"),
        ("FacebookAI/xlm-roberta-base", None),
        ("distilbert-base-uncased", None),
        ("roberta-base/checkpoint", None),
    ],
)
def test_preset_of_a_model(model, preset):
    assert preset_of(model) == preset


def test_the_ablations_runs():
    runs = runs_of("--methods", "full", "sparsegrad", "--num-values", 18000, 22000, 30000, 100000)
    assert [(run.method, run.num_values, run.density) for run in runs] == [
        ("full", None, 1.0),
        *(("sparsegrad", number, 0.01) for number in (18000, 22000, 30000, 100000)),
    ]
