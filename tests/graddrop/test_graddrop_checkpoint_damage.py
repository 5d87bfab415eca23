"""A damaged adapter file is refused by the name of the tensor, and changes nothing."""

import pytest
import torch
from graddrop_checkpoint_tools import FILE, WEIGHT, fill, saved
from graddrop_tools import deltas, dropped, tower
from peft import PeftModel
from safetensors.torch import save_file
from tiny import llama, train


@pytest.fixture
def model():
    """An adapter whose deltas a test fills."""
    return dropped(tower(num_blocks=1, dtype=torch.float32), target_modules=["up", "down"])


UP, DOWN = WEIGHT, WEIGHT.replace("up", "down")  # as a bit mask, and as indices; the biases are full
DAMAGE = {
    "missing": (
        lambda t: t.pop(UP),
        r"1 tensors of the adapter are missing.*up.*weight_delta|weight_delta_s\w+' has no values",
    ),
    "missing bias": (
        lambda t: t.pop(UP.replace("weight", "bias")),
        "1 tensors of the adapter are missing.*layers.0.up.graddrop_adapter.*bias_delta",
    ),
    "missing support": (
        lambda t: t.pop(f"{UP}_support"),
        r"weight_delta_shape' needs a '_support' beside it",
    ),
    "missing shape": (
        lambda t: t.pop(f"{UP}_shape"),
        r"weight_delta_support' needs a '_shape' beside it",
    ),
    "another shape": (
        lambda t: t[f"{UP}_shape"].copy_(torch.tensor([8, 16])),
        r"up\.graddrop_adapter.*weight_delta_shape' is \(8, 16\), and the shape here \(16, 8\)",
    ),
    "dtype of the shape": (
        lambda t: t.update({f"{UP}_shape": t[f"{UP}_shape"].float()}),
        r"up\.graddrop_adapter.*weight_delta_shape' must be a vector of torch.int32",
    ),
    "unknown": (
        lambda t: t.update({UP.replace("layers.0", "layers.9"): torch.zeros(16, 8)}),
        r"has no place for 1 tensors.*layers\.9\.up\.graddrop_adapter.*weight_delta",
    ),
    "unknown support": (
        lambda t: t.update({f"{UP.replace('weight', 'bias')}_support": torch.zeros(2, dtype=torch.uint8)}),
        r"graddrop_adapter\.bias",
    ),
    "support of nothing": (
        lambda t: t.update(
            {UP.replace("layers.0.up", "layers.0.norm") + "_support": torch.zeros(2, dtype=torch.uint8)}
        ),
        r"has no place for 1 tensors.*norm\.graddrop_adapter.*weight_delta|weight_delta_support' has no values",
    ),
    "shape": (
        lambda t: t.update({UP.replace("weight", "bias"): torch.zeros(15)}),
        r"layers\.0\.up\.graddrop_adapter.*bias_delta.*has shape \(15,\), not \(16,\)",
    ),
    "transposed": (
        lambda t: (t.pop(f"{UP}_support"), t.pop(f"{UP}_shape"), t.update({UP: torch.zeros(8, 16)})),
        r"layers\.0\.up\.graddrop_adapter.*weight_delta.*has shape \(8, 16\), not \(16, 8\)",
    ),
    "dtype": (
        lambda t: t.update({UP: t[UP].int()}),
        r"layers\.0\.up\.graddrop_adapter.*weight_delta.*has dtype torch\.int32, not (one of floats|torch\.float32)",
    ),
    "dtype of the support": (
        lambda t: t.update({f"{UP}_support": t[f"{UP}_support"].int()}),
        r"layers\.0\.up\.graddrop_adapter.*weight_delta.*stored as torch\.uint8 of shape \(16,\), not as torch\.int32",
    ),
    "truncated values": (
        lambda t: t.update({UP: t[UP][:-1].contiguous()}),
        r"layers\.0\.up\.graddrop_adapter.*weight_delta.*the support has 60 entries, not 59",
    ),
    "too many values": (
        lambda t: t.update({UP: torch.zeros(129)}),
        r"layers\.0\.up\.graddrop_adapter.*weight_delta.*holds values of shape \(129,\) for 128 entries",
    ),
    "values of two dimensions": (
        lambda t: t.update({UP: t[UP].view(2, 30)}),
        r"layers\.0\.up\.graddrop_adapter.*weight_delta.*holds values of shape \(2, 30\) for 128 entries",
    ),
    "too few mask bits": (
        lambda t: t.update({f"{UP}_support": t[f"{UP}_support"][:-1].contiguous()}),
        r"layers\.0\.up\.graddrop_adapter.*weight_delta.*of shape \(16,\), not as torch\.uint8 of shape \(15,\)",
    ),
    "bits lost": (
        lambda t: t.update({f"{UP}_support": torch.zeros_like(t[f"{UP}_support"])}),
        r"layers\.0\.up\.graddrop_adapter.*weight_delta.*the support has 0 entries, not 60",
    ),
    "index too large": (
        lambda t: t.update({f"{DOWN}_support": torch.tensor([1, 5, 128], dtype=torch.int32)}),
        r"layers\.0\.down\.graddrop_adapter.*weight_delta.*must be sorted, unique and within \[0, 128\)",
    ),
    "negative index": (
        lambda t: t.update({f"{DOWN}_support": torch.tensor([-1, 5, 9], dtype=torch.int32)}),
        r"layers\.0\.down\.graddrop_adapter.*weight_delta.*must be sorted, unique and within",
    ),
    "duplicate index": (
        lambda t: t.update({f"{DOWN}_support": torch.tensor([1, 5, 5], dtype=torch.int32)}),
        r"layers\.0\.down\.graddrop_adapter.*weight_delta.*must be sorted, unique and within",
    ),
    "unsorted indices": (
        lambda t: t.update({f"{DOWN}_support": torch.tensor([5, 1, 9], dtype=torch.int32)}),
        r"layers\.0\.down\.graddrop_adapter.*weight_delta.*must be sorted, unique and within",
    ),
    "too few indices": (
        lambda t: t.update({f"{DOWN}_support": torch.tensor([1, 5], dtype=torch.int32)}),
        r"layers\.0\.down\.graddrop_adapter.*weight_delta.*stored as torch\.uint8 of shape \(7,\)",
    ),
}
# Loading under a new name begins with the file alone, and under the present one with the model.


@pytest.fixture
def damaged(model, tmp_path):
    for name, count in (("up.weight", 60), ("down.weight", 3), ("up.bias", 16), ("down.bias", 8)):
        fill(deltas(model)[f"layers.0.{name}"], count)
    tensors = saved(model, tmp_path)
    assert {key: len(tensor) for key, tensor in tensors.items() if key.endswith("_support")} == {
        f"{UP}_support": 128 // 8,
        f"{DOWN}_support": 7,
    }

    def damage(kind):
        DAMAGE[kind][0](tensors)
        save_file(tensors, tmp_path / FILE)
        return tmp_path, DAMAGE[kind][1]

    return damage


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_file_is_refused_by_the_name_of_the_tensor(damaged, kind):
    path, message = damaged(kind)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(tower(num_blocks=1, dtype=torch.float32), path)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_file_leaves_a_loaded_adapter_alone(damaged, model, kind):
    path, message = damaged(kind)
    before = {name: delta.detach().clone() for name, delta in deltas(model).items()}
    with pytest.raises(ValueError, match=message):
        model.load_adapter(path, "default")
    assert all(torch.equal(deltas(model)[name], delta) for name, delta in before.items())


def test_truncated_file_is_refused(model, tmp_path):
    fill(deltas(model)["layers.0.up.weight"], 128)
    model.save_pretrained(tmp_path)
    content = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(content[: len(content) - 20])
    with pytest.raises(Exception, match=r"incomplete|Incomplete|not fully covered"):
        PeftModel.from_pretrained(tower(num_blocks=1, dtype=torch.float32), tmp_path)


@pytest.mark.parametrize("other", [{"intermediate_size": 80}, {"num_hidden_layers": 2}, {"num_hidden_layers": 4}])
def test_adapter_of_another_model_is_refused(tmp_path, other):
    model = dropped()
    train(model, steps=1)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"trained on another model|not found in the base model"):
        PeftModel.from_pretrained(llama(**other), tmp_path)
