"""Training on English and testing on other languages, through the real program."""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from fresh import ROOT, environment, run_program
from tiny import bert
from torch import nn
from xglue_files import LANGUAGES, runs_of

from examples.xglue import report, tiny_encoder, train
from examples.xglue.encoder import build_model, head_modules
from examples.xglue.runs import Run
from examples.xglue.tasks import TASKS, XGLUE
from experiments.methods import METHODS
from experiments.results import read_results
from peft_sparsegrad.cli.errors import InputError

PROGRAM = [sys.executable, "-m", "examples.xglue.train"]
BLOCK = 4 * (32 * 32 + 32) + (32 * 64 + 64) + (64 * 32 + 32) + 2 * 2 * 32  # attention, MLP, two LayerNorms


def test_every_task_is_trained_scored_in_every_language_and_reported(options, tmp_path):
    options += ["--languages", *LANGUAGES, "--epochs", "1"]
    assert train.main([*options, "--methods", "graddrop-off"]) == 0
    assert train.main([*options, "--methods", "graddrop", "--tasks", "POS", "MLQA"]) == 0
    results = read_results(tmp_path / "out" / "results.jsonl", Run)
    done = [(task, "graddrop-off") for task in XGLUE] + [("POS", "graddrop"), ("MLQA", "graddrop")]
    assert [(run.task, run.method) for run in results] == done
    for run, record in results.items():
        assert [entry["epoch"] for entry in record["epochs"]] == [1]
        for entry in record["epochs"]:
            assert set(entry["scores"]) == {*LANGUAGES, "english dev"}
            assert all(0 <= scores[TASKS[run.task].metric] <= 100 for scores in entry["scores"].values())
    assert not list((tmp_path / "out" / "checkpoints").iterdir()), "the checkpoints are no longer needed"

    assert report.main([str(tmp_path / "out" / "results.jsonl"), "--out", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| MLQA (f1) | understanding score |" in text
    assert "mean exact match" in text
    assert "| graddrop | 2 |" in text
    assert (tmp_path / "report" / "gain-POS.png").exists()


def test_every_kind_of_method_trains(options, tmp_path):
    methods = ["graddrop-off", "full", "lora", "sparsegrad"]
    assert train.main([*options, "--tasks", "POS", "--methods", *methods, "--epochs", "1"]) == 0
    results = read_results(tmp_path / "out" / "results.jsonl", Run)
    trained = {run.method: record["trained_parameters"] for run, record in results.items()}
    head = 32 * 17 + 17
    assert trained["graddrop-off"] == 4 * BLOCK + head
    assert trained["full"] == 4 * ((32 * 64 + 64) + (64 * 32 + 32)) + head
    assert 0 < trained["lora"] - head < trained["full"] - head


def test_the_defaults_are_fine_tuning_and_all_variants_on_all_tasks(options):
    chosen = runs_of(options)
    assert len(chosen) == 9 * 11
    assert {run.method for run in chosen} == {name for name in METHODS if "grad" in name and "sparse" not in name}


def test_dropout_is_off_unless_asked_for(options):
    for rate in (0.0, 0.3):
        model = build_model(runs_of(options, "--tasks", "QAM", "--methods", "graddrop", "--dropout", str(rate))[0])
        rates = {module.p for module in model.modules() if isinstance(module, nn.Dropout)}
        assert rates == {rate}


def test_the_papers_dropout_is_off_with_gradient_dropout_and_its_rate_without(options):
    runs = runs_of(options, "--tasks", "QAM", "--methods", *METHODS, "--dropout", "paper")
    rates = {run.method: run.dropout for run in runs}
    without = {name for name in rates if name.startswith(("graddrop", "anneal", "layer-graddrop"))} - {"graddrop-off"}
    assert len(without) == 7
    assert {rates[name] for name in without} == {0.0}
    assert {rates[name] for name in rates.keys() - without} == {0.2}


@pytest.mark.parametrize("method", ["graddrop", "layer-graddrop", "full", "lora"])
def test_embeddings_train_in_full_and_unmasked_if_they_are_to(method, options):
    """Their gradients are those of plain fine-tuning, because a mask changes no other gradient."""
    run = runs_of(options, "--tasks", "QAM", "--methods", method, "--embeddings", "trained")[0]
    found, wanted = embedding_gradients(run), embedding_gradients(replace(run, method="graddrop-off"))
    kinds = {"word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm"}
    assert {kind for kind in kinds for name in found if f".{kind}." in name} == kinds
    for gradient, plain in zip(found.values(), wanted.values(), strict=True):
        assert gradient.any()
        torch.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-7)
    assert not embedding_gradients(replace(run, embeddings="frozen"))


def embedding_gradients(run: Run) -> dict[str, torch.Tensor]:
    """The gradients of the embeddings that train, in the first step."""
    model = build_model(run)
    model.train()(input_ids=torch.arange(5, 13).view(1, -1), labels=torch.tensor([1])).loss.backward()
    named = model.named_parameters()
    return {name: p.grad for name, p in named if ".embeddings." in name and p.grad is not None}


def test_blocks_an_epoch_are_gradfreezes_alone(options):
    methods = ("gradfreeze-topdown", "graddrop-epoch")
    freeze, other = runs_of(options, "--tasks", "QAM", "--methods", *methods, "--blocks-per-epoch", "1")
    assert (freeze.blocks_per_epoch, other.blocks_per_epoch) == (1, 0)
    assert build_model(freeze).peft_config["default"].blocks_per_epoch == 1


def test_the_head_is_all_that_is_not_the_encoder_and_its_pooler():
    assert head_modules(bert()) == ["classifier", "bert.pooler"]


def errors(output: str) -> list[str]:
    assert "Traceback" not in output
    return [line for line in output.splitlines() if line.startswith("error: ")]


@pytest.mark.slow
def test_a_full_disk_ends_in_one_sentence(options):
    """Files cannot grow beyond 40 kB, which is less than a checkpoint."""
    command = [*PROGRAM, *options, "--tasks", "QAM", "--methods", "graddrop"]
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(), **limit)
    assert done.returncode == 2, done.stderr
    assert len(errors(done.stderr)) == 1
    assert "the disk is full" in errors(done.stderr)[0]


def test_a_wrong_path_ends_in_one_sentence(options, tmp_path):
    done = run_program("-m", "examples.xglue.train", *options, "--data", tmp_path / "nowhere", "--tasks", "WPR")
    assert done.returncode == 2
    (message,) = errors(done.stderr)
    assert re.search(r"cannot read .*nowhere/WPR/xglue\.wpr\.en\.train", message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "no/such-model"], "cannot load no/such-model, which is no folder here"),
        (
            ["--target-modules", "nonsense"],
            r"graddrop on .*no module of the model matches target_modules=\['nonsense'\]",
        ),
        (["--methods", "lora", "--target-modules", "nonsense"], "lora on .*no module of the model matches"),
        (["--methods", "graddrop-epoch", "--epochs", "1"], "graddrop-epoch on .*needs at least 2"),
        (["--methods", "gradfreeze-toggle-topdown", "--epochs", "5"], "with 5 epochs and 4 blocks"),
        (["--max-length", "500"], "takes at most 128 tokens, and --max-length is 500"),
        (["--languages", "en", "sw"], "no task of QAM has a test set in sw"),
        (["--tasks", "QAM", "NER", "--languages", "fr"], "NER has none of the languages fr"),
    ],
)
def test_input_that_cannot_be_used_is_named_before_anything_is_written(more, message, options, tmp_path):
    with pytest.raises(InputError, match=message):
        train.main([*options, "--tasks", "QAM", "--methods", "graddrop", *more])
    assert not (tmp_path / "out").exists()


def test_a_mistake_in_the_last_file_shows_before_the_first_run(options, data, tmp_path):
    broken = tmp_path / "benchmark"
    shutil.copytree(data, broken)
    (broken / TASKS["QADSM"].file("test", "de")).write_text("")
    more = ["--data", str(broken), "--tasks", "QAM", "QADSM", "--methods", "graddrop", "--languages", "en", "de"]
    with pytest.raises(InputError, match=r"xglue\.qadsm\.de\.test holds no examples"):
        train.main([*options, *more])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [["--tasks", "GLUE"], ["--methods", "x"], ["--max-length", "8"], ["--seeds", "-1"]])
def test_options_that_make_no_sense_are_refused(more, options, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main([*options, *more])
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("program", [train, report, tiny_encoder])
def test_help_explains_every_option_with_its_default(program, capsys):
    with pytest.raises(SystemExit) as stopped:
        program.main(["--help"])
    assert stopped.value.code == 0
    options = re.split(r"\n  (?=--|FILE)", capsys.readouterr().out.split("options:")[1])[1:]
    assert options
    assert all("(" in option for option in options), "a default in brackets"


def test_the_tiny_encoder_is_always_the_same(encoder, data, tmp_path):
    tiny_encoder.main(["--data", str(data), "--out", str(tmp_path)])
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (encoder / name).read_bytes()
    with pytest.raises(InputError, match=r"there are no files in .*nowhere"):
        tiny_encoder.main(["--data", str(tmp_path / "nowhere"), "--out", str(tmp_path)])
