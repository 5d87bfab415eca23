"""`python -m examples.glue.train` on a tiny encoder: its results, killed and resumed, and what it cannot use."""

import json
import resource
import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from glue_tools import MEASURED, SMALL, kill_when, make_run, results_in, save_model, start, write_data
from peft import PeftModel
from tiny import tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from examples.glue.arguments import GLUE_METHODS
from examples.glue.checkpoints import last_checkpoint
from examples.glue.dataset import Splits, load_task, tokenize
from examples.glue.finetune import Finetuner, is_over
from examples.glue.runs import Run
from examples.glue.tasks import TASKS
from examples.glue.train import in_words, main, parse_args
from experiments.results import finished_runs, read_json_lines
from experiments.terminal import run_and_exit


@pytest.fixture(scope="module")
def where(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("glue")
    return SimpleNamespace(model=save_model(folder / "model"), data=write_data(folder / "data"))


@pytest.fixture
def finetuner(where, tmp_path) -> Finetuner:
    tasks = (TASKS[name] for name in ("cola", "stsb"))
    splits = {
        task.name: Splits(*(tokenize(rows, task, tokenizer(), 32) for rows in load_task(task, where.data)))
        for task in tasks
    }
    return Finetuner(tokenizer(), splits, tmp_path / "runs", [])


def options(where, *more) -> list[str]:
    given = ("--model", where.model, "--data", where.data, *SMALL, "--batch-size", 8, *more)
    return [str(each) for each in given]


def without_times(record: dict) -> dict:
    return {key: value for key, value in record.items() if key not in MEASURED}


def assert_same(records: list[dict], others: list[dict]) -> None:
    """Equal but for the last digits, which may be others in another process: memory is aligned otherwise there."""
    for record, other in zip(records, others, strict=True):
        for found, expected in zip(record["evaluations"], other["evaluations"], strict=True):
            assert found == pytest.approx(expected, abs=1e-6)
        assert record["score"] == pytest.approx(other["score"], abs=1e-6)
        for key in ("run", "best_epoch", "trainable"):
            assert record[key] == other[key]


@pytest.fixture
def contrary(finetuner) -> Finetuner:
    """The dev rows are CoLA's training rows with the other label: the more is learnt, the worse the score."""
    train = finetuner.splits["cola"].train
    other_labels = train.map(lambda row: {"labels": 1 - row["labels"]})
    finetuner.splits["cola"] = Splits(train, other_labels)
    return finetuner


RESUMED_IN_EVERY_RUN = ("sparsegrad", "lora")


@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=[] if name in RESUMED_IN_EVERY_RUN else pytest.mark.slow) for name in GLUE_METHODS],
)
def test_resumed_from_the_checkpoint_before_the_last_a_run_is_the_same(where, finetuner, method):
    rest, task = ("frozen", "stsb") if "dynamic" in method or method == "shira" else ("trained", "cola")
    run = make_run(model=str(where.model), method=method, rest=rest, lr=1e-2, epochs=2, task=task)
    through = finetuner.finish(run)
    folder = finetuner.folder / run.folder_name
    (folder / "checkpoint-10" / "trainer_state.json").write_text("{")  # cut off while it was written
    assert without_times(finetuner.finish(run)) == without_times(through)
    assert [entry["epoch"] for entry in through["evaluations"]] == [1.0, 2.0]
    assert through["score"] == max(entry["score"] for entry in through["evaluations"])


def test_early_stopping_counts_on_after_a_kill_and_ends_where_it_would_have(where, contrary):
    run = make_run(model=str(where.model), rest="trained", lr=1e-2, epochs=12, patience=3)
    through = contrary.finish(run)
    epochs = len(through["evaluations"])
    assert through["best_epoch"] + 3 == epochs < 12
    folder = contrary.folder / run.folder_name
    shutil.rmtree(folder / f"checkpoint-{5 * epochs}")
    found = last_checkpoint(folder)
    assert found is not None
    assert not is_over(found[1], run.patience)
    assert without_times(contrary.finish(run)) == without_times(through)


def test_killed_before_its_result_was_written_a_run_trains_no_more(where, contrary):
    run = make_run(model=str(where.model), rest="trained", lr=1e-2, epochs=12, patience=1)
    through = contrary.finish(run)
    path, state = last_checkpoint(contrary.folder / run.folder_name)
    assert is_over(state, run.patience)
    assert state.global_step < state.max_steps
    before = path.stat().st_mtime_ns
    assert without_times(contrary.finish(run)) == without_times(through)
    assert path.stat().st_mtime_ns == before
    contrary.clean_up(run)
    assert not any(contrary.folder.iterdir())


@pytest.mark.parametrize("method", ["full", "sparsegrad", pytest.param("lora", marks=pytest.mark.slow)])
def test_the_model_that_is_kept_is_that_of_the_best_epoch(where, contrary, method, tmp_path):
    contrary.models = tmp_path / "models"
    run = make_run(model=str(where.model), method=method, rest="trained", lr=1e-2)
    result = contrary.finish(run)
    losses = [entry["loss"] for entry in result["evaluations"]]
    assert abs(losses[-1] - losses[result["best_epoch"] - 1]) > 0.1, "the last epoch's model would do as well"
    kept = tmp_path / "models" / run.folder_name
    assert {path.name for path in kept.iterdir()}.isdisjoint({"optimizer.pt", "trainer_state.json", "rng_state.pth"})
    if method == "full":
        model = AutoModelForSequenceClassification.from_pretrained(kept)
    else:
        base = AutoModelForSequenceClassification.from_pretrained(where.model, num_labels=2)
        model = PeftModel.from_pretrained(base, kept)
    arguments = TrainingArguments(str(tmp_path / "trainer"), use_cpu=True, report_to=[], label_names=["labels"])
    predicted = Trainer(model, arguments, data_collator=DataCollatorWithPadding(AutoTokenizer.from_pretrained(kept)))
    found = predicted.predict(contrary.splits["cola"].dev)
    assert TASKS["cola"].score(found.predictions, found.label_ids)["score"] == pytest.approx(result["score"])
    assert found.metrics["test_loss"] == pytest.approx(losses[result["best_epoch"] - 1], abs=1e-4)


def test_finished_runs_are_not_done_again_and_a_torn_one_is(where, tmp_path, capsys):
    arguments = options(where, "--tasks", "cola", "--methods", "full", "--seeds", "0", "1", "--lr", "1e-3")
    arguments += ["--rest", "frozen", "--train-rows", "16", "--epochs", "1", "--out", str(tmp_path)]
    assert main(arguments) == 0
    before = (tmp_path / "results.jsonl").read_bytes()
    assert main(arguments) == 0
    assert "0 of 2 runs to do" in capsys.readouterr().out
    assert (tmp_path / "results.jsonl").read_bytes() == before
    (tmp_path / "results.jsonl").write_bytes(before[:-30])
    assert main(arguments) == 0
    assert "1 of 2 runs to do" in capsys.readouterr().out
    assert [record["run"]["seed"] for record in results_in(tmp_path / "results.jsonl")] == [0, 1]
    assert {run.seed for run in finished_runs(tmp_path / "results.jsonl", Run)} == {0, 1}


def test_the_papers_methods_with_their_scores_speed_and_memory(where, tmp_path, capsys):
    """Tables 4, 5 and 7 to 10: the default methods, the rest of the model trained, in one command."""
    arguments = options(where, "--tasks", "cola", "--seeds", "0", "--lr", "1e-3", "--lora-rank", "2")
    arguments += ["--train-rows", "24", "--dev-rows", "12", "--out", str(tmp_path)]
    assert main([*arguments, "--epochs", "1", "--head-steps", "0"]) == 0
    records = {record["run"]["method"]: record for record in read_json_lines(tmp_path / "results.jsonl")}
    assert list(records) == ["full", "lora", "meprop-paper", "paper"]
    layers = {name: record["trainable"] for name, record in records.items()}
    assert layers["lora"]["layer"] == layers["lora"]["layer_in_step"] == 2 * (32 + 64)
    for method in ("paper", "meprop-paper"):
        assert (layers[method]["layer"], layers[method]["layer_in_step"]) == (32 * 64, round(0.05 * 32 * 64))
    for record in records.values():
        costs, trained = record["costs"], record["trainable"]["model"]
        assert 8 * trained <= costs["optimizer_bytes"] < 1.01 * 8 * trained + 1000
        assert costs["peak_memory"] > 16 * trained  # weights, gradients and Adam's two moments
        assert 4 * trained <= costs["saved_bytes"]
    printed = capsys.readouterr().out
    for title in ("Scores", "Steps per second", "Peak memory of a step, MB", "Sizes, MB"):
        _, _, table = printed.partition(f"### {title}\n")
        assert [row.split("|")[1].split(",")[0].strip() for row in table.strip().splitlines()[2:6]] == list(records)


def test_a_score_of_zero_is_shown_with_the_loss():
    evaluations = [{"epoch": 1.0, "score": 0.0, "loss": 0.61234}, {"epoch": 2.0, "score": 0.0, "loss": 0.6}]
    assert in_words({"score": 0.0, "best_epoch": 1, "evaluations": evaluations}) == (
        "0.00 (the same for all rows, loss 0.6123)"
    )
    assert in_words({"score": 0.5, "best_epoch": 1, "evaluations": evaluations}) == "50.00"


def test_a_failed_training_does_not_stop_the_others(where, tmp_path, capsys):
    arguments = options(where, "--tasks", "cola", "--methods", "meprop", "lora", "--seeds", "0", "--lr", "1e30")
    assert main([*arguments, "--rest", "trained", "--epochs", "1", "--out", str(tmp_path)]) == 1
    assert "the training failed" in capsys.readouterr().out
    assert [record["run"]["method"] for record in results_in(tmp_path / "results.jsonl")] == ["lora"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (["--model", "{tmp}/nowhere"], "cannot load {tmp}/nowhere, which is no folder here, from the hub"),
        (["--data", "{tmp}/nowhere"], "{tmp}/nowhere is no folder; --data is the folder above the tasks' folders"),
        (["--tasks", "rte"], "there is no train file of rte"),
        (["--target-modules", "up_proj"], "no module of the model matches target_modules=['up_proj']; name linear"),
        (["--num-values", "9999"], "--num-values 9,999 is more than the 2,048 of a target layer"),
        (["--train-rows", "41"], "--train-rows asks for 41 rows, and there are 40"),
        (["--dev-rows", "25"], "--dev-rows asks for 25 rows, and there are 24"),
        (["--rank", "8"], "`rank` is a setting of sparsegrad, columns, full-bases, "),
        (["--report-to", "nothing"], "--report-to nothing is not installed here"),
        (["--hyperparameters", "{tmp}/nowhere"], "cannot read {tmp}/nowhere: No such file"),
    ],
)
def test_what_cannot_be_used_is_one_sentence_and_nothing_is_written(where, tmp_path, capsys, change, reason):
    base = options(where, "--tasks", "cola", "--methods", "lora", "--lr", "1e-3", "--out", tmp_path / "out")
    change, reason = [text.replace("{tmp}", str(tmp_path)) for text in change], reason.replace("{tmp}", str(tmp_path))
    with pytest.raises(SystemExit) as end:
        run_and_exit(lambda: main([*base, *change]))
    assert end.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert reason in lines[-1]
    assert sum(text.startswith("error: ") for text in lines) == 1
    assert not (tmp_path / "out").exists()


def test_unknown_task_and_method(capsys):
    for change in (["--tasks", "rte", "ner"], ["--methods", "graddrop"]):
        with pytest.raises(SystemExit) as end:
            main(["--model", "m", *change])
        assert end.value.code == 2
        assert f"invalid choice: '{change[-1]}'" in capsys.readouterr().err


def test_every_option_is_explained(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("default") >= 20


def test_a_runs_folder_is_the_same_in_every_process():
    run = make_run()
    assert run.folder_name == make_run(**json.loads(json.dumps(run.__dict__))).folder_name
    assert run.folder_name != make_run(lr=2e-3).folder_name


def test_a_full_disk_is_one_sentence(where, tmp_path, capsys):
    arguments = options(where, "--tasks", "cola", "--methods", "lora", "--seeds", "0", "--lr", "1e-3")
    with pytest.raises(SystemExit) as end, small_files_only():
        run_and_exit(lambda: main([*arguments, "--out", str(tmp_path)]))
    assert end.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: the disk is full (")
    assert "Traceback" not in lines
    assert not (tmp_path / "results.jsonl").exists()


@contextmanager
def small_files_only():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_to_the_same_results(where, tmp_path):
    """Killed in the second run of two."""
    out, through = tmp_path / "killed", tmp_path / "through"
    methods = ["--tasks", "cola", "--methods", "lora", "sparsegrad", "--seeds", "0", "--lr", "1e-2"]
    arguments = options(where, *methods, "--rest", "trained", "--epochs", "6", "--patience", "6", "--out")
    assert main([*arguments, str(through)]) == 0
    command = ["train", *arguments, out]
    kill_when(start(*command), lambda: list(out.glob("runs/cola-sparsegrad-*/checkpoint-*/trainer_state.json")))
    left = (out / "results.jsonl").read_bytes()
    assert left.count(b"\n") == 1
    again = start(*command)
    assert again.wait() == 0, again.stderr
    assert "1 of 2 runs to do" in again.stdout
    assert (out / "results.jsonl").read_bytes().startswith(left)
    assert_same(results_in(out / "results.jsonl"), results_in(through / "results.jsonl"))
    assert not any((out / "runs").iterdir())
