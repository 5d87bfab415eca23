"""Runs that are killed and started again."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from fresh import Program, run_program
from transformers import TrainerCallback
from xglue_files import runs_of

from examples.xglue import train
from examples.xglue.checkpoints import last_complete_checkpoint
from examples.xglue.encoder import build_model, load_tokenizer
from examples.xglue.features import load_features
from examples.xglue.training import make_trainer


def kill_in_run(options: list[str], checkpoints: Path) -> None:
    """Start the program, and kill it as soon as the run's second checkpoint is begun: then there is a whole one."""
    program = Program("-m", "examples.xglue.train", *options)
    deadline = time.monotonic() + 240
    while program.returncode is None and time.monotonic() < deadline:
        if any(path.name != "checkpoint-3" for path in checkpoints.glob("checkpoint-*")):
            program.kill()
            break
        time.sleep(0.001)
    assert program.returncode == -signal.SIGKILL, f"the run ended before it could be killed: {program.stdout}"


@pytest.mark.slow
def test_killed_and_started_again_gives_the_same_results(options, tmp_path):
    """Killed in the second run; the first is not done again, and the second goes on from its checkpoint."""
    options += ["--tasks", "NER", "--methods", "layer-graddrop", "graddrop-epoch", "--dropout", "0.1"]
    options += ["--save-steps", "3", "--epochs", "4"]
    train.main([*options, "--out", str(tmp_path / "whole")])
    kill_in_run(options, tmp_path / "out" / "checkpoints" / runs_of(options)[1].folder_name)
    first_line = (tmp_path / "out" / "results.jsonl").read_text().splitlines()[0]
    again = run_program("-m", "examples.xglue.train", *options)
    assert again.returncode == 0, again.stderr
    assert "1 of 2 runs to do" in again.stdout
    assert "goes on from" in again.stdout
    text = (tmp_path / "out" / "results.jsonl").read_text()
    assert text.splitlines()[0] == first_line
    assert text == (tmp_path / "whole" / "results.jsonl").read_text()
    assert train.main(options) == 0
    assert (tmp_path / "out" / "results.jsonl").read_text() == text, "there was nothing left to do"


class Interrupt(TrainerCallback):
    """Stops in the middle of an epoch, as a kill does."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "method",
    ["graddrop-epoch", *(pytest.param(m, marks=pytest.mark.slow) for m in ("layer-graddrop", "full", "sparsegrad"))],
)
def test_a_resumed_run_ends_with_the_same_weights(method, options, tmp_path):
    """Interrupted in step 8 of 12, in the second of three epochs of four steps; the last checkpoint is step 6's."""
    options += ["--epochs", "3", "--dropout", "0.1", "--embeddings", "trained"]
    run = runs_of(options, "--tasks", "QAM", "--methods", method)[0]
    rows, sets = load_features(run.model, run.data, run.task, run.split, run.languages, run.max_length, None)

    def trained(folder: Path, interrupt: bool = False, checkpoint: Path | None = None):
        tokenizer, model = load_tokenizer(run.model), build_model(run)
        trainer = make_trainer(run, model, tokenizer, rows, sets, folder, 3)
        if interrupt:
            trainer.add_callback(Interrupt())
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return model.state_dict(), [entry for entry in trainer.state.log_history if "scores" in entry]

    weights, scores = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", interrupt=True)
    checkpoint = last_complete_checkpoint(tmp_path / "cut")
    assert checkpoint.name == "checkpoint-6"
    again, scores_again = trained(tmp_path / "cut", checkpoint=checkpoint)
    assert scores_again == scores
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path):
    assert last_complete_checkpoint(tmp_path / "nothing") is None
    for step, state in {"90": "{}", "100": "{}", "110": '{"epoch"', "120": None}.items():
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-100"


def test_no_checkpoint_is_of_a_finished_epoch_without_scores(options, tmp_path, monkeypatch):
    """With checkpoints every 2 steps and epochs of 4; one of step 4 must have the first epoch's scores."""
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # keeps every checkpoint
    train.main([*options, "--tasks", "QAM", "--methods", "graddrop", "--save-steps", "2"])
    states = {
        int(path.parent.name.rpartition("-")[2]): json.loads(path.read_text())["log_history"]
        for path in tmp_path.glob("out/checkpoints/*/checkpoint-*/trainer_state.json")
    }
    assert {step: len(history) for step, history in states.items()} == {2: 0, 4: 1, 6: 1}


def test_what_a_kill_left_after_a_result_is_cleaned_up(options, tmp_path):
    options += ["--tasks", "QAM", "--methods", "graddrop"]
    train.main(options)
    left = tmp_path / "out" / "checkpoints" / runs_of(options)[0].folder_name / "checkpoint-8"
    left.mkdir(parents=True)
    train.main(options)
    assert not left.parent.exists()
