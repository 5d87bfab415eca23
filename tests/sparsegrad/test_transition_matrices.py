"""Bases and supports in a file (`transition_matrices`) are used again, or refused where they do not fit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import adapted, llama, logits, train
from warmup_tools import BATCHES, layers, same, state

from peft_sparsegrad import save_transition_matrices, warmup


@pytest.fixture
def saved(tmp_path):
    model = adapted(warmup_steps=4, rank=24)
    warmup(model, BATCHES, progress=False)
    path = tmp_path / "matrices.safetensors"
    save_transition_matrices(model, path)
    return model, str(path)


def test_file_gives_the_same_adapter_without_data(saved):
    model, path = saved
    assert same(state(adapted(warmup_steps=4, rank=24, transition_matrices=path)), state(model))


def test_file_with_another_density_gives_the_basis_and_watches_for_the_support(saved):
    model, path = saved
    other = adapted(warmup_steps=2, rank=20, density=0.1, transition_matrices=path)
    group, own = layers(model)[0].adapter("default").basis, layers(other)[0].adapter("default").basis
    assert torch.equal(own.U, group.U[:, :20])
    train(other, steps=2)
    assert torch.equal(own.U, group.U[:, :20])
    assert layers(other)[0].adapter("default").is_settled


def test_file_of_one_sided_bases(tmp_path):
    """`up_proj` has a U and `down_proj` a V; an adapter of a lower rank takes the leading columns."""
    settings = {"warmup_steps": 4, "rank": "narrower"}
    model = adapted(**settings, slack=6)
    warmup(model, BATCHES, progress=False)
    path = str(tmp_path / "matrices.safetensors")
    save_transition_matrices(model, path)
    assert sorted(key for key in load_file(path) if key.startswith("group.")) == ["group.0.U", "group.1.V"]
    assert same(state(adapted(**settings, slack=6, transition_matrices=path)), state(model))
    lower = adapted(**settings, slack=3, transition_matrices=path)
    for layer, wide in zip(layers(lower), layers(model), strict=True):
        own, group = layer.adapter("default").basis, wide.adapter("default").basis
        for name in ("U", "V"):
            ours, theirs = getattr(own, name), getattr(group, name)
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours, theirs[:, : ours.shape[1]])
        assert not layer.adapter("default").is_settled
    base = llama()
    for change in ({"slack": 12}, {"rank": 12}, {"rank": (8, None)}, {"rank": "auto"}):
        with pytest.raises(ValueError, match=r"\(\[64, 32\], \[None, 10\]\)|\(\[32, 64\], \[10, None\]\)") as error:
            adapted(base, **{**settings, "slack": 6, "transition_matrices": path, **change})
        assert "None: that side keeps the weight's own basis" in str(error.value)
        assert str(error.value).endswith("or leave `transition_matrices` out")
        assert not layers(base)


def test_file_is_not_needed_to_load_the_adapter(saved, tmp_path):
    from peft import PeftModel

    _, path = saved
    model = adapted(warmup_steps=4, rank=24, transition_matrices=path)
    train(model, steps=2)
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["transition_matrices"] is None
    (tmp_path / "matrices.safetensors").unlink()
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "adapter")), logits(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 40}, r"needs weight shape \(64, 32\) and at least the ranks \[40, 32\]"),
        ({"rank": "auto", "slack": 6}, r"needs weight shape \(64, 32\) and at least the ranks \[None, 10\]"),
        ({"rank": (None, 24)}, "at least the ranks"),
        ({"target_modules": ["gate_proj"]}, "has no basis for module 'model.layers.0.mlp.gate_proj'"),
        ({"transition_matrices": "nowhere.safetensors"}, "there is no file 'nowhere.safetensors'"),
    ],
)
def test_file_that_does_not_fit_is_refused_before_anything_changes(saved, change, message):
    _, path = saved
    model = llama()
    with pytest.raises(ValueError, match=message):
        adapted(model, **{"warmup_steps": 4, "rank": 24, "transition_matrices": path, **change})
    assert not layers(model)


def test_file_of_another_model_is_refused(saved):
    _, path = saved
    with pytest.raises(ValueError, match="needs weight"):
        adapted(llama(hidden_size=48), warmup_steps=4, rank=24, transition_matrices=path)


def test_damaged_or_foreign_file_is_refused(saved, tmp_path):
    _, path = saved
    content = Path(path).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    save_file(load_file(path), tmp_path / "foreign.safetensors")
    for name, message in (("cut", "damaged"), ("foreign", "not written by")):
        with pytest.raises(ValueError, match=message):
            adapted(warmup_steps=4, rank=24, transition_matrices=str(tmp_path / f"{name}.safetensors"))
