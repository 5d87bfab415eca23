"""The adapter file: what is in it, what it costs, and what happens when it is damaged."""

import os
import resource
import signal

import pytest
import torch
from fresh import run_program
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import adapted, llama, logits, train
from transformers import AutoModelForCausalLM

from peft_sparsegrad.functional import packed_support_size, unpack_support

FILE = "adapter_model.safetensors"


@pytest.fixture
def saved(tmp_path):
    model = adapted(warmup_steps=4)
    train(model, steps=8)
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def test_loads_in_a_fresh_process(saved, tmp_path):
    model, path = saved
    torch.save(logits(model), tmp_path / "expected.pt")
    code = """
import sys, torch, peft_sparsegrad
from peft import PeftModel
from tiny import llama, logits
loaded = PeftModel.from_pretrained(llama(), sys.argv[1])
assert torch.equal(logits(loaded), torch.load(sys.argv[2]))
merged = loaded.merge_and_unload()
assert torch.allclose(logits(merged), torch.load(sys.argv[2]), atol=1e-5)
"""
    done = run_program("-c", code, path, tmp_path / "expected.pt")
    assert done.returncode == 0, done.stderr


def test_process_that_forgot_the_import_gets_pefts_own_error(saved):
    _, path = saved
    code = "import sys; from peft import PeftConfig; PeftConfig.from_pretrained(sys.argv[1])"
    done = run_program("-c", code, path)
    assert "KeyError: 'SPARSEGRAD'" in done.stderr


@pytest.mark.parametrize("how", ["load_adapter", "auto"])
def test_loads_through_transformers(saved, tmp_path, how):
    model, path = saved
    if how == "load_adapter":
        loaded = llama()
        loaded.load_adapter(str(path))
    else:
        llama().save_pretrained(tmp_path / "base")
        config = (path / "adapter_config.json").read_text()
        (path / "adapter_config.json").write_text(
            config.replace('"base_model_name_or_path": null', f'"base_model_name_or_path": "{tmp_path / "base"}"')
        )
        loaded = AutoModelForCausalLM.from_pretrained(path)
    assert torch.equal(logits(loaded), logits(model))


def test_trained_and_saved_through_transformers_loads_in_peft(tmp_path):
    from peft_sparsegrad import SparseGradConfig

    model = llama()
    model.add_adapter(SparseGradConfig(density=0.05, warmup_steps=4))
    train(model, steps=8)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))


@pytest.mark.parametrize(
    ("rank", "core_entries", "columns"),
    [
        ("auto", [64 * 10, 32 * 20], 32 * 10 + 64 * 20),
        ("narrower", [64 * 10, 10 * 64], 32 * 10 + 32 * 10),
        ((20, 12), [20 * 12] * 2, (64 + 32) * (20 + 12)),
    ],
)
def test_bytes_are_values_supports_and_one_set_of_matrices_per_group(tmp_path, rank, core_entries, columns):
    """4 bytes a value, its packed position, 16 bytes of state, 2 bytes an entry of U and V; then a header."""
    model = adapted(warmup_steps=4, rank=rank, slack=6)
    train(model, steps=5)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    k, blocks = 102, 3
    layers = sum(4 * k + packed_support_size(entries, k) + 16 for entries in core_entries)
    assert size == blocks * layers + 2 * columns
    assert sum(key.endswith((".U", ".V")) for key in tensors) == (4 if rank == (20, 12) else 2)
    assert (tmp_path / FILE).stat().st_size - size < 6000
    assert not [key for key in tensors if "gradient_sum" in key]


DAMAGE = {
    "missing": (
        lambda t, k: t.pop(k("values")),
        r"tensors of the adapter are missing, the first is '.*sparsegrad_adapter\.(default\.)?values",
    ),
    "shape": (lambda t, k: t.update({k("values"): t[k("values")][:-1]}), "has shape"),
    "basis": (lambda t, k: t.update({k(".U"): t[k(".U")][:, :-1].contiguous()}), "U' has shape"),
    "dtype": (
        lambda t, k: t.update({k("support"): t[k("support")].float()}),
        "has dtype torch.float32, not torch.uint8",
    ),
    "count": (lambda t, k: t.update({k("support"): torch.zeros_like(t[k("support")])}), "the support has 0 entries"),
    "range": (lambda t, k: t.update({k("support"): torch.full_like(t[k("support")], 255)}), "entries, not 102"),
    "weight_shape": (
        lambda t, k: t[k("weight_shape")].fill_(64),
        r"weight_shape': .* of \(64, 64\), not \(32, 64\)|values' has shape \(102,\), not \(205,\)",
    ),
    "weight_shape of one": (lambda t, k: t.update({k("weight_shape"): torch.tensor([64])}), "weight_shape' "),
    "NaN": (lambda t, k: t[k("values")][3:4].fill_(torch.nan), "values' holds NaN or Inf"),
    "infinite basis": (lambda t, k: t[k(".U")][2, 1:2].fill_(torch.inf), "U' holds NaN or Inf"),
    "column lost": (lambda t, k: t[k(".U")][:, 1].zero_(), "columns of '.*U' are not orthonormal"),
    "columns equal": (lambda t, k: t[k(".U")][:, 1].copy_(t[k(".U")][:, 0]), "columns of '.*U' are not orthonormal"),
    "steps": (lambda t, k: t[k("steps")].fill_(-2), "steps' must be at least -1, not -2"),
    "unknown": (
        lambda t, k: t.update({k("values").replace("layers.0", "layers.9"): t[k("values")].clone()}),
        "has no place for|layers.9.*weight_shape' of the adapter is missing",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_adapter_is_refused_by_the_name_of_the_tensor(saved, kind):
    """Under a new name before the model is changed, and under the name of an adapter that is there before it is."""
    model, path = saved
    tensors = load_file(path / FILE)
    damage, message = DAMAGE[kind]
    damage(tensors, lambda part: next(key for key in sorted(tensors) if part in key))
    save_file(tensors, path / FILE)
    base = llama()
    before = list(base.state_dict())
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, path)
    assert list(base.state_dict()) == before
    expected = logits(model)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(path, "default")
    assert torch.equal(logits(model), expected)


def test_indices_of_an_older_file_are_checked(tmp_path):
    model = adapted(num_values=10, rank="full")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    key = next(key for key in sorted(tensors) if key.endswith(".support"))
    tensors[key] = unpack_support(tensors[key], 64 * 32, 10).int()
    for position, value in ((0, -1), (9, 64 * 32), (1, int(tensors[key][0]))):
        damaged = {**tensors, key: tensors[key].clone()}
        damaged[key][position] = value
        save_file(damaged, tmp_path / FILE)
        with pytest.raises(ValueError, match="must be sorted, unique and within"):
            PeftModel.from_pretrained(llama(), tmp_path)


def test_truncated_file_is_refused(saved):
    _, path = saved
    content = (path / FILE).read_bytes()
    (path / FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(Exception, match=r"incomplete|Incomplete|not fully covered"):
        PeftModel.from_pretrained(llama(), path)


def test_adapter_of_another_model_is_refused(saved):
    _, path = saved
    with pytest.raises(ValueError, match="trained on another model"):
        PeftModel.from_pretrained(llama(intermediate_size=80), path)
    with pytest.raises(ValueError, match="trained on another model"):
        PeftModel.from_pretrained(llama(num_hidden_layers=2), path)


def test_interrupted_save_leaves_the_previous_adapter(saved):
    """The disk is full in the middle of the second save."""
    model, path = saved
    assert (path / FILE).stat().st_size > 8000, "the limit below must fall inside the adapter's file"
    expected = logits(model)
    process = os.fork()
    if process == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
        train(model, steps=2)
        try:
            model.save_pretrained(path)
        except SafetensorError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 7
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), path)), expected)


def test_state_dict_of_what_trains_is_refused_and_a_whole_one_saved(tmp_path):
    """A loop that keeps only what requires a gradient would lose the supports and the bases."""
    model = adapted()
    train(model, steps=2)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with pytest.raises(ValueError, match=r"lacks 26 of the 32 tensors of the adapter.*pass `model.state_dict"):
        model.save_pretrained(tmp_path, state_dict=trained)
    assert not (tmp_path / FILE).exists()
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))
