"""`peft-sparsegrad warmup`: its file takes the place of a warm-up, and is there in full or not at all."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import tiny
import torch
from fresh import environment
from safetensors.torch import load_file

from peft_sparsegrad import SparseGradConfig, WarmUpReport
from peft_sparsegrad.cli.data import labelled_batches, language_batches, read_labelled, read_texts
from peft_sparsegrad.cli.errors import InputError
from peft_sparsegrad.sparsegrad.layer import layer_adapters

SIZES = ("--density", 0.05, "--steps", 4, "--batch-size", 4, "--max-length", 12)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [" ".join(f"t{3 + (i * step) % 60}" for step in range(20)) for i in range(1, 30)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "data.csv"
    rows = [f'"t{3 + i} t{5 + i} t{4 + i % 7}",{"abc"[i % 3]}\n' for i in range(30)]
    path.write_text("".join(["sentence,label\n", *rows]))
    return path


def test_file_takes_the_place_of_a_warm_up(shelf, command, text, tmp_path):
    out, report = tmp_path / "new" / "matrices.safetensors", tmp_path / "report.json"
    model = shelf.saved_base()
    result = command("warmup", "--model", model, "--data", text, "--out", out, "--report", report, *SIZES)
    assert result.code == 0
    assert "4 backward passes" in result.out
    found = WarmUpReport.from_json(report)
    assert [group.name for group in found.groups] == ["model.layers.*.mlp.up_proj", "model.layers.*.mlp.down_proj"]
    assert all(0 < group.energy_in_support < group.energy_in_core <= 1 for group in found.groups)
    from peft import get_peft_model

    config = SparseGradConfig(density=0.05, transition_matrices=str(out), task_type="CAUSAL_LM")
    trained = get_peft_model(tiny.llama(), config)
    layers = layer_adapters(trained, "default")
    assert all(layer.is_settled for layer in layers)
    matrices = load_file(out)
    assert torch.equal(layers[0].basis.U, matrices["group.0.U"].float())
    losses = tiny.train(trained, steps=6)
    assert losses[-1] < losses[0]


def test_options_reach_the_adapter(shelf, command, text, tmp_path):
    out = tmp_path / "matrices.safetensors"
    words = ("warmup", "--model", shelf.saved_base(), "--data", text, "--out", out, *SIZES)
    found = command(*words, "--rank", "20,16", "--target-modules", "q_proj, v_proj", "--json").json
    assert {group["name"].rpartition(".")[2] for group in found["groups"]} == {"q_proj", "v_proj"}
    assert {tuple(group["core_shape"]) for group in found["groups"]} == {(20, 16)}
    assert {group["num_values"] for group in found["groups"]} == {51}


def test_classifier_settles_its_head_first(shelf, command, table, tmp_path):
    model = shelf.saved_base("bert")
    words = ("warmup", "--model", model, "--data", table, *SIZES)
    assert command(*words, "--out", tmp_path / "new.safetensors").code == 0
    assert command(*words, "--out", tmp_path / "settled.safetensors", "--head-steps", 5).code == 0
    new, settled = (load_file(tmp_path / f"{name}.safetensors") for name in ("new", "settled"))
    assert new.keys() == settled.keys()
    assert any(not torch.equal(new[key], settled[key]) for key in new)


@pytest.mark.slow
def test_killed_in_the_middle_and_started_again(shelf, command, text, tmp_path):
    out, report = tmp_path / "matrices.safetensors", tmp_path / "report.json"
    words = ["warmup", "--model", shelf.saved_base(), "--data", text, "--steps", 100, "--batch-size", 4]
    words += ["--max-length", 12, "--report", report, "--out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "peft_sparsegrad", *map(str, words), str(out)],
        stderr=subprocess.PIPE,
        env=environment(),
    )
    shown = b""
    while not re.search(rb"\b[1-9]\d?/100", shown):  # of the progress bar, after the first passes
        byte = os.read(process.stderr.fileno(), 4096)
        assert byte, shown.decode()
        shown += byte
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    assert not report.exists()
    assert command(*words, out).code == 0
    assert command(*words, tmp_path / "uninterrupted.safetensors", "--overwrite").code == 0
    found, expected = load_file(out), load_file(tmp_path / "uninterrupted.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_bad_input_ends_in_one_sentence(shelf, refused, text, table, tmp_path):
    out, model = tmp_path / "out.safetensors", shelf.saved_base()
    words = ("warmup", "--model", model, "--out", out)
    few = tmp_path / "few.txt"
    few.write_text("t3 t4")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "t3"}\n{"txt": 3}\n')
    rows = tmp_path / "rows.tsv"
    rows.write_text("sentence\tlabel\nt3 t4\t1\nt5\n")
    one = tmp_path / "one.csv"
    one.write_text("sentence,label\nt3,a\nt4,a\n")
    cases = {
        "one.csv has one label alone, 'a'": (*words, "--data", one),
        "no such file": (*words, "--data", tmp_path / "none.txt"),
        "holds 3 tokens": (*words, "--data", few, "--max-length", 12),
        "bad.jsonl, line 2: a record needs": (*words, "--data", bad),
        "rows.tsv, line 3: 1 columns, not the 2 of sentence, label": (*words, "--data", rows),
        "must end in one of .txt": (*words, "--data", tmp_path / "data.parquet"),
        "`density` must be in": (*words, "--data", text, "--max-length", 12, "--density", 7),
        "Target modules {'nope'} not found": (*words, "--data", text, "--max-length", 12, "--target-modules", "nope"),
        "bert is an encoder: give labelled": (
            "warmup",
            "--model",
            shelf.saved_base("bert"),
            "--out",
            out,
            "--data",
            text,
        ),
        "--rank must be": (*words, "--data", text, "--rank", "1,2,3"),
        "--max-length 2049 is more than": (*words, "--data", table, "--max-length", 2049),
        "from the hub": ("warmup", "--model", "no/such/model", "--out", out, "--data", text),
        "must end in .safetensors": ("warmup", "--model", model, "--out", tmp_path / "x.pt", "--data", text),
    }
    for message, case in cases.items():
        found = refused(*case).lower()
        assert message.lower() in found
        assert not out.exists()


def test_what_is_there_is_kept(shelf, refused, text, tmp_path):
    out, report = tmp_path / "out.safetensors", tmp_path / "report.json"
    report.write_text("mine")
    words = ("warmup", "--model", shelf.saved_base(), "--data", text, "--out", out, "--report", report, *SIZES)
    assert "is there already" in refused(*words)
    assert report.read_text() == "mine"
    assert not out.exists()


def test_texts_of_every_kind(tmp_path):
    records = [
        {"text": "a"},
        {"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]},
        {"instruction": "d", "instances": [{"input": "", "output": "e"}]},
        {"instruction": "f", "input": "g", "output": "h"},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    assert read_texts(path) == ["a", "b\n\nc", "d\n\ne", "f\n\ng\n\nh"]
    (tmp_path / "data.txt").write_text("one\ntwo\n\n\nthree")
    assert read_texts(tmp_path / "data.txt") == ["one\ntwo", "\nthree"]
    (tmp_path / "data.txt").write_text(" \n")
    with pytest.raises(InputError, match="holds no text"):
        read_texts(tmp_path / "data.txt")


def test_labelled_sentences_of_every_kind(tmp_path):
    (tmp_path / "a.csv").write_text('label,sentence\nyes,"a, b"\nno,c\n')
    found = read_labelled(tmp_path / "a.csv")
    assert (found.texts, found.labels, found.names) == (["a, b", "c"], [1, 0], ["no", "yes"])
    (tmp_path / "cola.tsv").write_text('gj04\t1\t\tA "b c.\ngj04\t0\t*\tD.\n')
    found = read_labelled(tmp_path / "cola.tsv")
    assert (found.texts, found.labels) == (['A "b c.', "D."], [1, 0])
    (tmp_path / "b.csv").write_text("sentence\na\n")
    with pytest.raises(InputError, match="has no column `label`"):
        read_labelled(tmp_path / "b.csv")


def test_every_row_is_used_once_before_any_is_used_again():
    tokenizer = tiny.tokenizer()
    texts = [f"t{3 + i}" for i in range(5)]
    batches = language_batches(texts, tokenizer, steps=5, size=2, length=2, seed=0)
    seen = torch.cat([batch["input_ids"][:, 0] for batch in batches])
    assert sorted(seen.tolist()) == sorted([3, 4, 5, 6, 7] * 2)
    assert {batch["input_ids"][0, 1].item() for batch in batches} == {tokenizer.eos_token_id}
    sentences = read_labelled_rows(texts)
    labelled = labelled_batches(sentences, tokenizer, steps=3, size=5, length=1, seed=1)
    assert all(sorted(batch["labels"].tolist()) == [0, 1, 2, 3, 4] for batch in labelled)
    assert all(torch.equal(batch["input_ids"][:, 0] - 3, batch["labels"]) for batch in labelled)


def read_labelled_rows(texts):
    from peft_sparsegrad.cli.data import LabelledSentences

    return LabelledSentences(texts, list(range(len(texts))), [*map(str, range(len(texts)))])
