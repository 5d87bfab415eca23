"""`peft-sparsegrad plot`: every kind of picture, from the files that they are made of."""

import copy
import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import VOCAB, batch, llama, rows, tokenizer
from transformers import Trainer, TrainingArguments

from peft_sparsegrad import GradDropConfig, SparseGradCallback, SparseGradConfig, SparseGradLinear, warmup
from peft_sparsegrad.cli.plot_adapter import graddrop_layers, weight_gradient
from peft_sparsegrad.cli.saved.adapter import SavedAdapter


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text(" ".join(f"t{3 + i % (VOCAB - 3)}" for i in range(200)))
    return path


def size_of_png(path):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_kinds_of_adapters(shelf, command, text, tmp_path):
    sparsegrad, graddrop = shelf.adapter("sparsegrad"), shelf.adapter("graddrop")
    gradient = ("--data", text, "--max-length", 12, "--batch-size", 4)
    pictures = {
        "support": (sparsegrad,),
        "active": (graddrop, "--epochs", 4),
        "gradient": (sparsegrad, "--kind", "gradient", *gradient, "--module", "model.layers.0.mlp.down_proj"),
        "magnitudes": (shelf.adapter("sparsegrad-full"), "--kind", "magnitudes", *gradient),
        "rows": (shelf.adapter("sparsegrad-full"), "--kind", "rows", *gradient),
    }
    for kind, words in pictures.items():
        result = command("plot", *words, "--out", tmp_path / f"{kind}.png", "--json")
        assert result.code == 0
        assert result.json == {"kind": kind, "out": str(tmp_path / f"{kind}.png")}
        assert min(size_of_png(tmp_path / f"{kind}.png")) > 300


def test_report_and_log(command, tmp_path):
    from peft import get_peft_model

    config = SparseGradConfig(density=0.05, warmup_steps=4, task_type="CAUSAL_LM")
    report = warmup(get_peft_model(llama(), config), [batch(i) for i in range(4)], progress=False)
    report.to_json(tmp_path / "report.json")
    assert command("plot", tmp_path / "report.json", "--out", tmp_path / "spectra.svg").out.startswith("spectra: ")
    assert "<svg" in (tmp_path / "spectra.svg").read_text()
    settings = {"max_steps": 4, "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(str(tmp_path / "run"), save_steps=4, **settings)
    model = get_peft_model(llama(), config)
    Trainer(model, arguments, train_dataset=rows(32), callbacks=[SparseGradCallback()]).train()
    log = tmp_path / "run" / "checkpoint-4" / "trainer_state.json"
    assert command("plot", log, "--out", tmp_path / "energy.pdf").out.startswith("energy: ")
    assert (tmp_path / "energy.pdf").read_bytes().startswith(b"%PDF")


def test_gradient_is_that_of_the_frozen_weight(shelf):
    """Against central differences of the loss, at the trained adapter."""
    model = copy.deepcopy(shelf.model("sparsegrad-gpt2")).double().eval()
    layer = [module for module in model.modules() if isinstance(module, SparseGradLinear)][1]
    found = weight_gradient(model, layer, batch())
    weight = layer.get_base_layer().weight
    assert layer.fan_in_fan_out
    assert found.shape == weight.shape[::-1]
    direction = torch.randn_like(weight)
    losses = []
    with torch.no_grad():
        for step in (1e-4, -1e-4):
            weight += step * direction
            logits = model(**batch()).logits[:, :-1].flatten(0, 1)  # the model's own loss is rounded to float32
            losses.append(torch.nn.functional.cross_entropy(logits, batch()["labels"][:, 1:].flatten()))
            weight -= step * direction
    slope = (losses[0] - losses[1]) / 2e-4
    assert slope.item() == pytest.approx((found.T * direction).sum().item(), rel=1e-4)
    assert not weight.requires_grad


def test_order_of_layers_comes_from_the_base_model_where_names_do_not_tell(shelf, copied):
    config = GradDropConfig.from_variant("GradFreeze-TopDown", num_epochs=2)
    assert graddrop_layers(SavedAdapter(shelf.adapter("graddrop")), config, None) == [
        f"model.layers.{number}" for number in range(3)
    ]
    path = copied("graddrop")
    tensors = load_file(path / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.graddrop_adapter.weight_delta"] = torch.ones(VOCAB, 32)
    save_file(tensors, path / "adapter_model.safetensors")
    found = graddrop_layers(SavedAdapter(path), config, str(shelf.saved_base()))
    assert found == ["model.layers.0", "model.layers.1", "model.layers.2", "lm_head"]


def test_what_cannot_be_drawn_ends_in_one_sentence(shelf, refused, text, tmp_path):
    sparsegrad, out = shelf.adapter("sparsegrad"), ("--out", tmp_path / "out.png")
    (tmp_path / "numbers.json").write_text("[1, 2]")
    (tmp_path / "half.json").write_text('{"groups": [')
    (tmp_path / "other.json").write_text('{"groups": [{"name": "x"}]}')
    (tmp_path / "log.json").write_text(json.dumps({"log_history": [{"loss": 1.0, "step": 1}]}))
    cases = {
        "support is drawn of a SPARSEGRAD adapter, and this is a LORA adapter": (shelf.adapter("lora"),),
        "spectra is drawn of a warm-up report": (sparsegrad, "--kind", "spectra"),
        "the whole core trains": (shelf.adapter("sparsegrad-dynamic"),),
        "how many epochs the run had: give --epochs": (shelf.adapter("graddrop"),),
        "give --data": (sparsegrad, "--kind", "gradient"),
        "has no layer 'nope'": (sparsegrad, "--kind", "gradient", "--data", text, "--module", "nope"),
        "numbers.json is neither": (tmp_path / "numbers.json",),
        "half.json cannot be read": (tmp_path / "half.json",),
        "other.json is neither": (tmp_path / "other.json",),
        "the log has no energy captured": (tmp_path / "log.json",),
        "none.json cannot be read": (tmp_path / "none.json",),
    }
    for message, words in cases.items():
        assert message in refused("plot", *words, *out)
    assert "must end in .png or .svg or .pdf" in refused("plot", sparsegrad, "--out", tmp_path / "out.jpg")
    (tmp_path / "mine.png").write_text("mine")
    assert "is there already" in refused("plot", sparsegrad, "--out", tmp_path / "mine.png")
    assert not (tmp_path / "out.png").exists()


def test_data_must_suit_the_task(shelf, refused, command, text, tmp_path):
    labelled = tmp_path / "data.csv"
    labelled.write_text("sentence,label\nt3 t4,2\nt5,1\nt6,0\n")
    words = ("--kind", "magnitudes", "--max-length", 12, "--out", tmp_path / "out.png", "--data")
    classifier = shelf.adapter("sparsegrad-bert")
    assert "task CAUSAL_LM: give text" in refused("plot", shelf.adapter("sparsegrad"), *words, labelled)
    assert "task SEQ_CLS: give labelled sentences" in refused("plot", classifier, *words, text)
    assert command("plot", classifier, *words, labelled).code == 0
    (tmp_path / "out.png").unlink()
    for names in ("0123", "abc"):  # one too many, and names whose numbers nothing says
        labelled.write_text("sentence,label\n" + "".join(f"t{3 + i},{name}\n" for i, name in enumerate(names)))
        message = f"has the labels {', '.join(names)}, and the model tells LABEL_0, LABEL_1, LABEL_2 apart"
        assert message in refused("plot", classifier, *words, labelled)


def test_base_without_a_tokenizer_is_named(shelf, refused, text, tmp_path):
    llama().save_pretrained(tmp_path / "bare")
    words = ("--kind", "gradient", "--data", text, "--base", tmp_path / "bare", "--out", tmp_path / "out.png")
    assert "there is no tokenizer" in refused("plot", shelf.adapter("sparsegrad"), *words)
    tokenizer().save_pretrained(tmp_path / "bare")


def test_missing_matplotlib_is_named(shelf, refused, monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.startswith(("matplotlib", "peft_sparsegrad.plots"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("peft_sparsegrad.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = refused("plot", shelf.adapter("sparsegrad"), "--out", tmp_path / "out.png")
    assert "pip install 'peft-sparsegrad[plot]'" in message
