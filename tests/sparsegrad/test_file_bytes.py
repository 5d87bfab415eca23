"""What a SparseGrad file holds of bases and supports: 16 bits where that loses nothing, and a small exact code."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import adapted, batch, llama, train

from peft_sparsegrad import SparseGradConfig, save_transition_matrices, warmup
from peft_sparsegrad.sparsegrad.layer import layer_adapters


def trained(**settings):
    model = adapted(warmup_steps=4, **settings).train()
    warmup(model, [batch(number) for number in range(4)], progress=False)
    train(model, 3)
    return model


def stored(model, path) -> dict[str, torch.Tensor]:
    model.save_pretrained(path)
    return load_file(path / "adapter_model.safetensors")


def sides(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if ".sparsegrad_basis." in name}


def own_sides(model) -> list[torch.Tensor]:
    bases = {id(adapter.basis): adapter.basis for adapter in layer_adapters(model, "default")}
    return [side for basis in bases.values() for side in (basis.U, basis.V) if side is not None]


@pytest.mark.parametrize("settings", [{}, {"rank": 16}, {"basis": "svd"}, {"support": "dynamic"}], ids=str)
def test_bases_are_16_bits_in_the_file_and_the_loaded_adapter_is_the_trained_one(tmp_path, settings):
    model = trained(**settings)
    found = sides(stored(model, tmp_path))
    assert found
    assert all(side.dtype == torch.float16 for side in found.values())
    assert all(side.dtype == torch.float32 for side in own_sides(model))
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert all(side.dtype == torch.float32 for side in own_sides(loaded))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch(9)).logits, model.eval()(**batch(9)).logits)


def test_basis_is_rounded_before_anything_is_trained_in_it():
    model = adapted(warmup_steps=4, rank=16)
    warmup(model, [batch(number) for number in range(4)], progress=False)
    for side in own_sides(model):
        assert torch.equal(side, side.half().float())
        gram = side.double().T @ side.double()
        assert 0 < (gram - torch.eye(len(gram), dtype=torch.float64)).abs().max() < 1e-3


def test_square_basis_is_not_rounded(tmp_path):
    """With one, the layer is the paper's, which turns the weight into the basis and back."""
    model = trained(rank="full")
    assert all(side.dtype == torch.float32 for side in sides(stored(model, tmp_path)).values())
    for side in own_sides(model):
        torch.testing.assert_close(side @ side.T, torch.eye(len(side)), atol=1e-5, rtol=0)


def test_basis_that_float16_cannot_hold_stays_float32(tmp_path):
    """A weighted merge of different bases is exact, in a basis that was made orthonormal in float64."""
    model = trained(rank=12)
    model.add_adapter("other", SparseGradConfig(density=0.05, warmup_steps=4, rank=12))
    model.set_adapter("other")
    warmup(model, [batch(number) for number in range(4, 8)], adapter_name="other", progress=False)
    train(model, 3)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "merged", combination_type="cat")
    model.save_pretrained(tmp_path, selected_adapters=["merged"])
    found = sides(load_file(tmp_path / "merged" / "adapter_model.safetensors"))
    assert all(side.dtype == torch.float32 for side in found.values())
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "merged")
    model.set_adapter("merged")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch(9)).logits, model.eval()(**batch(9)).logits)


def test_transition_matrices_are_16_bits_and_give_the_same_bases(tmp_path):
    model = trained()
    path = str(tmp_path / "matrices.safetensors")
    save_transition_matrices(model, path)
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16, torch.uint8}
    again = adapted(transition_matrices=path)
    for own, other in zip(own_sides(model), own_sides(again), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize(
    ("settings", "most"), [({}, 0.75), ({"slack": 4}, 0.55), ({"basis": "columns"}, 0.75)], ids=str
)
def test_support_takes_a_fraction_of_a_byte_a_value(tmp_path, settings, most):
    tensors = stored(trained(**settings), tmp_path)
    supports = [tensor for name, tensor in tensors.items() if name.endswith(".support")]
    values = [tensor for name, tensor in tensors.items() if name.endswith(".values")]
    assert sum(tensor.nbytes for tensor in supports) < most * sum(tensor.numel() for tensor in values)
