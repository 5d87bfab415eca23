"""finetune.py: what it trains, what it saves, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from llama2_chat_runs import (
    limited_files,
    options,
    read_metrics,
    write_lines,
)
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from examples.llama2_chat.chat_template import encode_all, load_tokenizer
from examples.llama2_chat.conversations import read_conversations, split_conversations
from examples.llama2_chat.finetune import main
from examples.llama2_chat.load_model import load_base, load_finetuned
from experiments.terminal import run_and_exit
from peft_sparsegrad.cli.errors import InputError

LAYERS = [f"model.layers.{block}.mlp.{name}_proj" for block in (0, 3) for name in ("up", "down")]


def changed_weights(base, tuned) -> set[str]:
    """The modules in which two models differ."""
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    return {name.removesuffix(".weight") for name, w in tuned.state_dict().items() if not torch.equal(w, before[name])}


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("sparsegrad", {}),
        ("sparsegrad-dynamic", {}),
        ("lora", {"base": "4bit"}),
        pytest.param("shira", {}, marks=pytest.mark.slow),
        ("full", {"lr": 0.002, "base": "bf16"}),
        ("layer-graddrop", {"lr": 0.002}),
        ("sparsegrad", {"base": "4bit"}),
        pytest.param("sparsegrad", {"base": "8bit"}, marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_trains_every_third_block_and_saves(base, data, tmp_path, method, settings):
    out = tmp_path / "out"
    assert main(options(base, data, out, method=method, steps=12, save_steps=12, **settings)) == 0
    found = read_metrics(out)
    assert found["validation_loss_after"] < found["validation_loss_before"] - 0.02
    assert found["steps"] == 12
    assert found["saved_bytes"] == sum(path.stat().st_size for path in out.glob("*.safetensors")) > 0
    assert {"torch", "peft", "trl", "peft-sparsegrad"} <= found["versions"].keys()
    assert load_tokenizer(out).chat_template == (out / "chat_template.jinja").read_text()
    if settings.get("base", "float32") != "float32":
        return
    tuned = load_finetuned(out, None, merge=method != "full")
    assert changed_weights(base, tuned) == set(LAYERS)


@pytest.mark.parametrize("method", ["sparsegrad", "meprop", "lora"])
def test_methods_train_as_many_values(base, data, tmp_path, method):
    main(options(base, data, tmp_path / "out", method=method, steps=1, density=0.05))
    asked = round(0.05 * 64 * 128) * len(LAYERS)
    assert read_metrics(tmp_path / "out")["trainable_parameters"] == pytest.approx(asked, rel=0.1)


@pytest.mark.parametrize(("further", "renewed"), [({}, True), ({"set": "renewal_steps=0"}, False)])
def test_renewal_can_be_switched_off(base, data, tmp_path, further, renewed):
    """Supports that are not renewed keep no gradient sums, in the optimizer's checkpoint neither."""
    main(options(base, data, tmp_path / "out", steps=1, save_steps=1, **further))
    saved = torch.load(tmp_path / "out" / "checkpoint-1" / "optimizer.pt")
    carried = [layer for group in saved["param_groups"] for layer in group.get("sparsegrad", {}).values()]
    assert len(carried) == len(LAYERS)
    assert {layer["total"].numel() > 0 for layer in carried} == {renewed}


@pytest.mark.parametrize("base_precision", ["bf16", "4bit"])
def test_trained_values_are_float32(base, data, tmp_path, base_precision):
    """TRL casts what trains on a quantised base to bf16, and a bf16 base would train in bf16."""
    out = tmp_path / "out"
    main(options(base, data, out, method="lora", steps=1, base=base_precision))
    assert {tensor.dtype for tensor in load_file(out / "adapter_model.safetensors").values()} == {torch.float32}


def test_validation_loss_is_that_of_the_saved_adapter(base, data, tmp_path, adapter):
    """Of the untouched model before, and of what a new process would load after; both on the answers alone."""
    _, held_out = split_conversations(read_conversations(str(data), "en"), 0.1, seed=0)
    rows = encode_all(load_tokenizer(base), held_out, 128)
    found = read_metrics(adapter)
    model = load_base(base, "float32")
    for key in ("before", "after"):
        if key == "after":
            model = PeftModel.from_pretrained(model, adapter)
        with torch.no_grad():
            losses = [model(**{k: torch.tensor([v]) for k, v in row.items()}).loss for row in rows]
        tokens = [sum(label >= 0 for label in row["labels"]) for row in rows]
        mean = sum(loss * n for loss, n in zip(losses, tokens, strict=True)) / sum(tokens)
        assert found[f"validation_loss_{key}"] == pytest.approx(mean.item(), abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nowhere/model"}, "cannot load nowhere/model"),
        ({"data": "missing.jsonl"}, "cannot read missing.jsonl"),
        ({"target_modules": "c_fc"}, "no linear layer named c_fc in its blocks 0, 3, 6"),
        ({"max_length": 10}, "no answers are left"),
        ({"max_length": 4096}, "more than the 192 positions"),
        ({"method": "graddrop-epoch", "epochs": 1}, "epoch"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_unusable_input_is_refused_before_anything_is_written(base, data, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        main(options(base, data, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_folder_with_something_else_is_left_alone(base, data, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for overwrite in ([], ["--overwrite"]):
        with pytest.raises(InputError, match="holds no run of this program"):
            main([*options(base, data, tmp_path), *overwrite])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_command_line_says_what_is_wrong_in_one_sentence(base, tmp_path, capsys):
    empty = write_lines(tmp_path / "empty.jsonl", [])
    with pytest.raises(SystemExit) as ended:
        run_and_exit(lambda: main(options(base, empty, tmp_path / "out")))
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {empty} is empty"
    assert not (tmp_path / "out").exists()


def test_full_disk_is_said_in_one_sentence_and_the_run_goes_on_later(base, data, tmp_path, capsys):
    out = tmp_path / "out"
    with limited_files(8_000), pytest.raises(SystemExit) as ended:
        run_and_exit(lambda: main(options(base, data, out, steps=2)))
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: the disk is full")
    assert main(options(base, data, out, steps=2)) == 0
    assert read_metrics(out)["steps"] == 2


def test_full_finetuning_of_a_quantised_base_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--method", "full", "--base", "4bit"])
    assert "cannot train quantised weights" in capsys.readouterr().err


def test_log_reaches_the_screen(base, data, tmp_path, capsys):
    main(options(base, data, tmp_path / "out", steps=2, logging_steps=1))
    printed = capsys.readouterr().out
    assert printed.count("'learning_rate'") == 2
    assert "warm-up: 2 backward passes" in printed


def test_log_reaches_a_tracker(base, data, tmp_path):
    main(options(base, data, tmp_path / "out", method="lora", steps=1, report_to="tensorboard"))
    assert list((tmp_path / "out").rglob("events.out.tfevents.*"))
