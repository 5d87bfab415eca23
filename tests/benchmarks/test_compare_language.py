"""The comparison's language-modelling task, on a tiny LLaMA."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import bert, llama, tokenizer

from benchmarks.compare.__main__ import main
from benchmarks.compare.language import LanguageTask
from benchmarks.compare.runs import Run
from benchmarks.compare.tasks import TASKS
from benchmarks.compare.train import build_model
from experiments.results import read_results

TASK = TASKS["instructions"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, and ten instructions of which the n-th has the words t<3 + n> only."""
    folder = tmp_path_factory.mktemp("language")
    llama(max_position_embeddings=128).save_pretrained(folder / "model")
    bert().save_pretrained(folder / "bert")
    for name in ("model", "bert"):
        tokenizer().save_pretrained(folder / name)
    rng = random.Random(0)
    with (folder / "seed_tasks.jsonl").open("w") as file:
        for number in range(10):
            words = [" ".join([f"t{number + 3}"] * rng.randrange(40, 60)) for _ in range(5)]
            instances = [{"input": "", "output": words[1]}, {"input": words[2], "output": words[3]}]
            file.write(json.dumps({"instruction": words[0], "instances": instances}) + "\n")
    return folder


def arguments(folder: Path, *options: str, model: str = "model") -> list[str]:
    where = ["run", "--model", str(folder / model), "--data", str(folder), "--tasks", "instructions"]
    what = ["--methods", "lora", "--lrs", "1e-2", "--train-rows", "8", "--batch-size", "4", "--epochs", "2"]
    return [*where, *what, "--out", str(folder / "results.jsonl"), *options]


def test_a_run_ends_with_the_mean_loss_of_the_dev_tokens(folder, capsys):
    assert main(arguments(folder)) == 0
    (record,) = read_results(folder / "results.jsonl", Run).values()
    losses = [scores["loss"] for scores in record["evaluations"]]
    assert losses[-1] != losses[0]
    assert record["evaluations"][-1]["metric"] == pytest.approx(math.exp(losses[-1]))
    assert record["trained_head_parameters"] == 0 < record["trained_parameters"]


def test_the_score_is_the_models_own_loss(folder):
    rows = TASK.rows(folder, "dev", tokenizer())
    model = build_model(replace(run_of(folder), method="full"), folder).eval()
    batch = TASK.collator(tokenizer())(rows)
    with torch.no_grad():
        output = model(**batch)
    scores = TASK.score(TASK.reduce(output.logits, batch["labels"]).numpy(), batch["labels"].numpy())
    assert scores["loss"] == pytest.approx(output.loss.item(), rel=1e-5)


def run_of(folder: Path):
    main(arguments(folder))
    return next(iter(read_results(folder / "results.jsonl", Run)))


def test_every_fifth_instruction_is_for_scoring_alone(folder):
    seen = {split: {token for row in TASK.rows(folder, split, tokenizer()) for token in row["input_ids"]} - {2}
            for split in ("train", "dev")}  # fmt: skip
    assert seen["dev"] == {7, 12}
    assert seen["train"] == set(range(3, 13)) - {7, 12}
    assert all(len(row["input_ids"]) == 128 for row in TASK.rows(folder, "train", tokenizer()))


def test_a_document_is_prompt_input_answer(folder, tmp_path):
    record = {"instruction": "t3", "instances": [{"input": "t4", "output": "t5"}, {"input": "", "output": "t6"}]}
    (tmp_path / "seed_tasks.jsonl").write_text(json.dumps(record) + "\n")
    assert isinstance(TASK, LanguageTask)
    assert TASK.load(tmp_path, "train") == [["t3\n\nt4\n\nt5", "t3\n\nt6"]]


@pytest.mark.parametrize(
    ("options", "model", "message"),
    [
        (["--head-steps", "3"], "model", "instructions has no task head to train first: leave --head-steps at 0"),
        (
            ["--train-rows", "99"],
            "model",
            "training blocks of 128 tokens, and --train-rows asks for 99; --epochs",
        ),
        ([], "bert", "instructions needs a causal language model, and"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(folder, capsys, options, model, message):
    assert main(arguments(folder, *options, model=model)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


def test_a_line_of_another_format_is_named(folder, tmp_path, capsys):
    (tmp_path / "seed_tasks.jsonl").write_text('{"instruction": "t3", "instances": []}\n{"text": "t3"}\n')
    assert main(arguments(folder, "--data", str(tmp_path))) == 2
    assert "seed_tasks.jsonl, row 2 is not in the format of instructions" in capsys.readouterr().err
