"""`python -m examples.glue.search` on a tiny encoder: what it finds, killed and resumed."""

import json
import shutil
from types import SimpleNamespace

import optuna
import pytest
from glue_tools import SMALL, kill_when, save_model, start, write_data
from optuna.trial import TrialState

from examples.glue.hyperparameters import read_found
from examples.glue.search import DATABASE, FOUND, main, parse_args
from examples.glue.train import list_runs
from examples.glue.train import parse_args as parse_train_args
from experiments.terminal import run_and_exit

TRIALS = 3


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> SimpleNamespace:
    """A search that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("search")
    where = ["--model", str(save_model(folder / "model")), "--data", str(write_data(folder / "data"))]
    sizes = [*SMALL, "--patience", "7", "--epochs", "7"]
    arguments = [*where, "--tasks", "cola", "--methods", "sparsegrad", "--trials", str(TRIALS), *sizes, "--out"]
    through = folder / "through"
    assert main([*arguments, str(through)]) == 0
    return SimpleNamespace(arguments=arguments, through=through)


def in_second_trial(out) -> bool:
    """Whether the second trial has a checkpoint; the first one's are deleted before the second begins."""

    def has_checkpoint() -> bool:
        return any(out.glob("search/*/checkpoint-*/trainer_state.json"))

    return has_checkpoint() and states(out) == [TrialState.COMPLETE, TrialState.RUNNING] and has_checkpoint()


def states(folder) -> list:
    return [trial.state for trial in trials(folder)]


def trials(folder, *wanted) -> list:
    storage = f"sqlite:///{folder / DATABASE}"
    (name,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage).get_trials(states=wanted or None)


def test_the_values_are_in_the_papers_range_and_the_best_are_kept(searched):
    finished = trials(searched.through, TrialState.COMPLETE)
    assert len({trial.params["lr"] for trial in finished}) == len(finished) == TRIALS
    assert all(1e-6 <= trial.params["lr"] <= 1e-1 for trial in finished)
    assert all(trial.params["batch_size"] in (8, 16, 32) for trial in finished)
    best = max(finished, key=lambda trial: trial.value)
    (entry,) = json.loads((searched.through / FOUND).read_text())
    assert entry == {
        "model": searched.arguments[1], "task": "cola", "method": "sparsegrad", **best.params,
        "score": best.value, "trials": TRIALS,
    }  # fmt: skip
    assert not any((searched.through / "search").iterdir())


def test_training_takes_what_was_found(searched):
    found = searched.through / FOUND
    (values,) = read_found(found).values()
    line = [
        "--model",
        "m",
        "--tasks",
        "cola",
        "--methods",
        "sparsegrad",
        "--seeds",
        "0",
        "--hyperparameters",
        str(found),
    ]
    (run,) = list_runs(parse_train_args(line))
    assert (run.batch_size, run.lr) == values


def test_a_finished_search_does_nothing_and_more_trials_go_on(searched, tmp_path, capsys):
    shutil.copytree(searched.through, tmp_path / "copy")
    assert main([*searched.arguments, str(tmp_path / "copy")]) == 0
    assert "trial" not in capsys.readouterr().out
    assert main([*searched.arguments, str(tmp_path / "copy"), "--trials", str(TRIALS + 1)]) == 0
    assert f"trial {TRIALS + 1} of {TRIALS + 1}" in capsys.readouterr().out
    before, after = (trials(folder, TrialState.COMPLETE) for folder in (searched.through, tmp_path / "copy"))
    assert [trial.params for trial in after[:TRIALS]] == [trial.params for trial in before]


def test_a_trial_whose_training_fails_counts_as_the_worst(searched, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("examples.glue.search.LR_RANGE", (1e30, 1e31))
    arguments = [*searched.arguments, str(tmp_path), "--methods", "meprop", "--trials", "1", "--epochs", "1"]
    assert main(arguments) == 0
    assert "the training failed" in capsys.readouterr().out
    assert [trial.value for trial in trials(tmp_path, TrialState.COMPLETE)] == [-1.0]


def test_a_database_that_cannot_be_used_is_one_sentence(searched, tmp_path, capsys):
    (tmp_path / DATABASE).write_text("not a database, but long enough to be taken for one" * 100)
    with pytest.raises(SystemExit) as end:
        run_and_exit(lambda: main([*searched.arguments, str(tmp_path)]))
    assert end.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"error: {tmp_path / DATABASE} cannot be read or written: ")


def test_a_file_that_is_no_result_of_a_search(tmp_path):
    from peft_sparsegrad.cli.errors import InputError

    for text in ("{", "[1]", '[{"task": "rte", "method": "lora", "batch_size": 0, "lr": 0.1}]'):
        (tmp_path / FOUND).write_text(text)
        with pytest.raises(InputError, match=r"is no file of examples\.glue\.search"):
            read_found(tmp_path / FOUND)


def test_every_option_is_explained(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    assert " ".join(capsys.readouterr().out.split()).count("default") >= 16


@pytest.mark.slow
def test_killed_in_a_trial_it_goes_on_to_the_same_result(searched, tmp_path):
    command = ["search", *searched.arguments, tmp_path]
    kill_when(start(*command), lambda: in_second_trial(tmp_path))
    assert states(tmp_path) == [TrialState.COMPLETE, TrialState.RUNNING]
    again = start(*command)
    assert again.wait() == 0, again.stderr
    assert "trial 1 of" not in again.stdout
    assert f"trial {TRIALS} of {TRIALS}" in again.stdout
    pairs = zip(trials(tmp_path, TrialState.COMPLETE), trials(searched.through, TrialState.COMPLETE), strict=True)
    for resumed, expected in pairs:
        assert resumed.params == expected.params
        assert resumed.value == pytest.approx(expected.value, abs=1e-6)
    assert len(trials(tmp_path, TrialState.FAIL)) == 1
    (found,), (expected,) = (json.loads((folder / FOUND).read_text()) for folder in (tmp_path, searched.through))
    assert found == pytest.approx(expected, abs=1e-6)
