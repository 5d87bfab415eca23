"""`peft-sparsegrad convert`: what was written computes what the adapter computes, and says by how much it does not."""

import os
import resource
import signal

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import batch, logits
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from peft_sparsegrad.cli.app import run


@pytest.mark.parametrize("name", ["sparsegrad", "sparsegrad-gpt2", "sparsegrad-identity"])
def test_lora_computes_the_same(shelf, command, tmp_path, name):
    found = command("convert", shelf.adapter(name), "--to", "lora", "--out", tmp_path / "lora", "--json").json
    assert found["largest_error"] < 1e-6
    base = AutoModelForCausalLM.from_pretrained(shelf.saved_base("gpt2" if "gpt2" in name else "llama"))
    loaded = PeftModel.from_pretrained(base, tmp_path / "lora")
    assert loaded.peft_config["default"].peft_type == "LORA"
    assert torch.allclose(logits(loaded), logits(shelf.model(name)), atol=1e-4)


def test_error_of_a_lower_rank_is_the_distance_that_diff_finds(shelf, command, tmp_path):
    words = ("convert", shelf.adapter("sparsegrad"), "--to", "lora", "--rank", 4, "--out", tmp_path / "lora", "--json")
    errors = command(*words).json["errors"]
    assert min(errors.values()) > 0.05
    layers = command("diff", shelf.adapter("sparsegrad"), tmp_path / "lora", "--json").json["layers"]
    assert {layer["module"]: pytest.approx(layer["distance"], rel=1e-3) for layer in layers} == errors


def test_graddrop_as_lora_with_its_error_and_its_loss(shelf, command, tmp_path):
    (tmp_path / "text.txt").write_text("t3 t3 t4 t4 t5 t5 t6 t6\n\n" * 8)
    options = ("--rank", 4, "--data", tmp_path / "text.txt", "--max-length", 8)
    words = ("convert", shelf.adapter("graddrop"), "--to", "lora", "--out", tmp_path / "lora", *options)
    found = command(*words, "--json").json
    assert 0.05 < found["largest_error"] < 1
    assert found["num_bytes"] < (tmp_path / "lora" / "adapter_model.safetensors").stat().st_size
    assert found["adapter_bytes"] == (shelf.adapter("graddrop") / "adapter_model.safetensors").stat().st_size
    base = AutoModelForCausalLM.from_pretrained(shelf.saved_base())
    model = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    ids = torch.tensor([[3, 3, 4, 4, 5, 5, 6, 6]])
    loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss == pytest.approx(found["output_change"]["loss_lora"], rel=0.2), "of about the same text"
    assert found["output_change"]["loss_adapter"] != found["output_change"]["loss_base"]
    text = command(*words, "--overwrite").out
    assert text.startswith(f"LoRA of rank 4: {found['num_bytes']:,} bytes; the adapter has {found['adapter_bytes']:,}")
    assert f"{found['output_change']['loss_lora']:.4f}" in text


def test_layers_that_lora_lacks_are_left_out_when_asked(shelf, command, refused, tmp_path):
    words = ("convert", shelf.adapter("graddrop-frozen"), "--to", "lora", "--rank", 2, "--out", tmp_path / "lora")
    assert "biases and modules that are not linear" in refused(*words)
    assert not (tmp_path / "lora").exists()
    assert command(*words, "--linear-only", "--json").json["largest_error"] == 1


@pytest.mark.parametrize("name", ["sparsegrad", "graddrop", "lora", "sparsegrad-gpt2"])
def test_merged_model_computes_the_same(shelf, command, tmp_path, name):
    result = command("convert", shelf.adapter(name), "--to", "merged", "--out", tmp_path / "merged", "--json")
    assert 0 < result.json["largest_error"] < 1e-4
    assert result.json["tokenizer"] is True
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(loaded), logits(shelf.model(name)), atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("t3 t4")["input_ids"] == [3, 4]


def test_error_of_a_merged_bf16_base_is_its_rounding(shelf, command, tmp_path):
    AutoModelForCausalLM.from_pretrained(shelf.saved_base()).bfloat16().save_pretrained(tmp_path / "bf16")
    words = ("--base", tmp_path / "bf16", "--out", tmp_path / "merged", "--json")
    errors = command("convert", shelf.adapter("sparsegrad"), "--to", "merged", *words).json["errors"]
    merged, base = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "bf16"))
    real = {m: layer.get_delta_weight("default") for m, layer in _layers(shelf.model("sparsegrad"))}
    for module, delta in real.items():
        written = merged[f"{module}.weight"].float() - base[f"{module}.weight"].float()
        assert errors[module] == pytest.approx(((delta - written).norm() / delta.norm()).item(), rel=1e-3)
        assert errors[module] > 1e-3


def _layers(model):
    return [(name, m) for name, m in model.get_base_model().named_modules() if hasattr(m, "get_delta_weight")]


@pytest.mark.parametrize("name", ["sparsegrad", "graddrop-frozen", "lora-rs", "sparsegrad-gpt2"])
def test_dense_file_holds_every_change(shelf, command, tmp_path, name):
    path = tmp_path / "new" / "dense.safetensors"
    result = command("convert", shelf.adapter(name), "--to", "dense", "--out", path)
    assert result.code == 0
    tensors = load_file(path)
    base = shelf.base("gpt2" if "gpt2" in name else "llama")
    parameters = dict(base.named_parameters())
    with torch.no_grad():
        for key, tensor in tensors.items():
            assert tensor.dtype == torch.float32
            parameters[key] += tensor
    assert torch.allclose(logits(base), logits(shelf.model(name)), atol=1e-4)
    assert len(tensors) == len(_layers(shelf.model(name)))


def test_classifier_with_its_own_number_of_labels(shelf, command, refused, tmp_path):
    path = shelf.adapter("sparsegrad-bert")
    assert command("convert", path, "--to", "merged", "--out", tmp_path / "merged").code == 0
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    inputs = {key: value for key, value in batch().items() if key != "labels"}
    with torch.no_grad():
        assert torch.allclose(
            loaded(**inputs).logits, shelf.model("sparsegrad-bert").eval()(**inputs).logits, atol=1e-4
        )
    for to, out in (("lora", "lora"), ("dense", "dense.safetensors")):
        assert "`modules_to_save`" in refused("convert", path, "--to", to, "--out", tmp_path / out)
        assert not (tmp_path / out).exists()


def test_what_cannot_be_converted_ends_in_one_sentence(shelf, refused, tmp_path):
    sparsegrad, out = shelf.adapter("sparsegrad"), tmp_path / "out"
    assert "these can: SPARSEGRAD, GRADDROP" in refused("convert", shelf.adapter("lora"), "--to", "lora", "--out", out)
    assert "`rank` must be given" in refused("convert", shelf.adapter("graddrop"), "--to", "lora", "--out", out)
    assert "IA3 adapter cannot be" in refused("convert", shelf.adapter("ia3"), "--to", "merged", "--out", out)
    assert "--rank is for" in refused("convert", sparsegrad, "--to", "merged", "--rank", 3, "--out", out)
    assert "must end in .safetensors" in refused("convert", sparsegrad, "--to", "dense", "--out", out)
    assert "is the adapter itself" in refused(
        "convert", sparsegrad, "--to", "merged", "--out", sparsegrad, "--overwrite"
    )
    wrong = refused("convert", sparsegrad, "--to", "merged", "--out", out, "--base", shelf.saved_base("gpt2"))
    assert "does not go onto its base model" in wrong
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["lora", "merged", "dense"])
def test_diverged_adapter_is_not_converted(copied, refused, tmp_path, to):
    path = copied("sparsegrad")
    tensors = load_file(path / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.1.mlp.up_proj.sparsegrad_adapter.values"][0] = float("inf")
    save_file(tensors, path / "adapter_model.safetensors")
    out = tmp_path / "out.safetensors"
    message = refused("convert", path, "--to", to, "--out", out)
    assert "'base_model.model.model.layers.1.mlp.up_proj.sparsegrad_adapter.values' holds NaN or Inf" in message
    assert not out.exists()


def test_output_is_replaced_only_when_asked(shelf, command, refused, tmp_path):
    words = ("convert", shelf.adapter("sparsegrad"), "--to", "lora", "--out", tmp_path / "out")
    (tmp_path / "out").mkdir()
    assert command(*words).code == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert "is not empty" in refused(*words, "--rank", 2)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    assert command(*words, "--rank", 2, "--overwrite").code == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() != before
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    dense = ("convert", shelf.adapter("sparsegrad"), "--to", "dense", "--out", tmp_path / "dense.safetensors")
    assert command(*dense).code == 0
    assert "is there already" in refused(*dense)


def test_leftovers_of_a_killed_run_are_no_hindrance(shelf, command, tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model.safetensors").write_text("half")
    words = ("convert", shelf.adapter("sparsegrad"), "--to", "lora", "--out", tmp_path / "out")
    assert command(*words).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_full_disk_ends_in_one_sentence_and_leaves_nothing(shelf, tmp_path):
    adapter = str(shelf.adapter("sparsegrad"))
    process = os.fork()
    if process == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        errors = os.open(tmp_path / "errors", os.O_CREAT | os.O_WRONLY)
        os.dup2(errors, 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
        try:
            import sys

            sys.stderr = os.fdopen(2, "w", closefd=False)
            run(["convert", adapter, "--to", "dense", "--out", str(tmp_path / "dense.safetensors")])
        except SystemExit as ended:
            sys.stderr.flush()
            os._exit(ended.code)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 2
    assert "error: the disk is full" in (tmp_path / "errors").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["errors"]
