"""Damaged files of every method: one sentence, exit status 2 and no traceback, from `inspect` and from `diff`."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cli_tools import WEIGHTS, changed
from safetensors.torch import load_file, save_file


@dataclass
class Damage:
    """Damage to one tensor of a file.

    Attributes:
        part: End of the tensor's name.
        change: Called with the tensor; returns the one that takes its place, or None to remove it.
        message: Part of what the command line says.
    """

    part: str
    change: Callable[[torch.Tensor], torch.Tensor | None]
    message: str

    def __call__(self, path: Path) -> None:
        changed(self.part, self.change)(path)


def gone(tensor):
    return None


def as_dtype(dtype):
    return lambda tensor: tensor.to(dtype)


def instead(*numbers, dtype=torch.int64):
    return lambda tensor: torch.tensor(numbers, dtype=dtype)


STEPS = "should be a whole number (int64) of at least -1, not"

SPARSEGRAD = {
    "basis of one dimension": Damage("U", lambda t: t[:, 0], "should have the shape (64, 20), not (64,)"),
    "basis of three": Damage("U", lambda t: t[None], "should have the shape (64, 20), not (1, 64, 20)"),
    "basis turned": Damage("U", lambda t: t.T, "should have the shape (64, 20), not (20, 64)"),
    "one basis missing": Damage("U", gone, "should have the shape (64, 20), and is missing"),
    "values empty": Damage("values", lambda t: t[:0], "should have the shape (102,), not (0,)"),
    "values longer": Damage("values", lambda t: t.repeat(2), "should have the shape (102,), not (204,)"),
    "values in a matrix": Damage("values", lambda t: t[None], "should have the shape (102,), not (1, 102)"),
    "a single value": Damage("values", lambda t: t[0], "should have the shape (102,), not ()"),
    "steps of two numbers": Damage("steps", instead(4, 5), "should have the shape (1,), not (2,)"),
    "steps of none": Damage("steps", instead(), "should have the shape (1,), not (0,)"),
    "steps not a number": Damage("steps", instead(float("nan"), dtype=torch.float32), f"{STEPS} nan"),
    "steps and a half": Damage("steps", instead(1.5, dtype=torch.float32), f"{STEPS} 1.5 (torch.float32)"),
    "steps below the warm-up": Damage("steps", instead(-2), f"{STEPS} -2"),
    "steps missing": Damage("steps", gone, "'model.layers.0.mlp.down_proj' has the tensors"),
    "support of another type": Damage("support", as_dtype(torch.int64), "not as torch.int64 of shape (63,)"),
    "support of truths": Damage("support", as_dtype(torch.bool), "not as torch.bool of shape (63,)"),
    "support shorter": Damage("support", lambda t: t[:-1], "not as torch.uint8 of shape (62,)"),
    "support of every entry": Damage("support", lambda t: t | 255, "entries, not 102"),
    "support missing": Damage("support", gone, "'model.layers.0.mlp.down_proj' has the tensors"),
    "weight shape of experts": Damage("weight_shape", instead(32, 64, 1, dtype=torch.int32), "should have the shape"),
    "weight shape of int64": Damage("weight_shape", as_dtype(torch.int64), "the weight shape of"),
    "weight shape turned": Damage("weight_shape", lambda t: t.flip(0), "should have the shape"),
}

IDENTITY = {
    "weight shape larger": Damage("weight_shape", lambda t: t * 2, "should have the shape (410,), not (102,)"),
    "support of another type": Damage("support", as_dtype(torch.int64), "not as torch.int64 of shape (84,)"),
}

DYNAMIC = {
    "values empty": Damage("values", lambda t: t[:0], "not (0,)"),
    "one value too many": Damage("values", lambda t: torch.cat([t, t[:1]]), "should have the shape"),
}

WHOLE = "should have a delta alone, or a delta with its support and its shape"

DELTA = "graddrop_adapter.weight_delta"
GRADDROP = {
    "support without shape": Damage(f"{DELTA}_shape", gone, f"has only ['delta', 'support'], and {WHOLE}"),
    "shape without support": Damage(f"{DELTA}_support", gone, f"has only ['delta', 'shape'], and {WHOLE}"),
    "support without values": Damage(DELTA, gone, f"has only ['shape', 'support'], and {WHOLE}"),
    "shape of floats": Damage(f"{DELTA}_shape", as_dtype(torch.float32), "tensor([32., 64.]) is no shape"),
    "shape of a number": Damage(f"{DELTA}_shape", lambda t: t[0], "32 is no shape"),
    "shape below zero": Damage(f"{DELTA}_shape", lambda t: -t, "is no shape"),
    "shape too large": Damage(f"{DELTA}_shape", lambda t: t * 2, "a support of 205 of 8192 entries is stored"),
    "shape too small": Damage(f"{DELTA}_shape", lambda t: t // 2, "a support of 205 of 512 entries is stored"),
    "shape empty": Damage(f"{DELTA}_shape", lambda t: t[:0], "a support of 205 of 1 entries is stored"),
    "shape of no entries": Damage(f"{DELTA}_shape", lambda t: t * 0, "a support of 205 of 0 entries is stored"),
    "values in a row": Damage(DELTA, lambda t: t[None], "should be a vector, not of shape (1, 205)"),
    "values in a column": Damage(DELTA, lambda t: t[:, None], "should be a vector, not of shape (205, 1)"),
    "a single value": Damage(DELTA, lambda t: t[0], "should be a vector, not of shape ()"),
    "values too few": Damage(DELTA, lambda t: t[1:], "a support of 204 of 2048 entries is stored"),
    "values empty": Damage(DELTA, lambda t: t[:0], "a support of 0 of 2048 entries is stored"),
    "support of floats": Damage(f"{DELTA}_support", as_dtype(torch.float32), "not as torch.float32"),
    "support of nothing": Damage(f"{DELTA}_support", lambda t: t * 0, "the support has 0 entries, not 205"),
}

RANKS = "which should be (r, in) and (out, r) with one rank r of 1 or more"
MATRICES = "only plain LoRA of linear layers can be read, whose factors are matrices"

LORA = {
    "rank of A smaller": Damage(
        "lora_A.weight", lambda t: t[:-1], f"lora_A of shape (2, 64) and lora_B of shape (32, 3), {RANKS}"
    ),
    "rank of B smaller": Damage(
        "lora_B.weight", lambda t: t[:, 1:], f"lora_A of shape (3, 64) and lora_B of shape (32, 2), {RANKS}"
    ),
    "A turned": Damage("lora_A.weight", lambda t: t.T, RANKS),
    "B turned": Damage("lora_B.weight", lambda t: t.T, RANKS),
    "A of one dimension": Damage(
        "lora_A.weight",
        lambda t: t.flatten(),
        f"lora_A of shape (192,) and lora_B of shape (32, 3); {MATRICES}",
    ),
    "B of one dimension": Damage("lora_B.weight", lambda t: t.flatten(), MATRICES),
    "A of three dimensions": Damage("lora_A.weight", lambda t: t[None], MATRICES),
    "A of a convolution": Damage("lora_A.weight", lambda t: t[:, :, None, None], MATRICES),
    "A missing": Damage("lora_A.weight", gone, "has the tensors lora_B.weight; only plain LoRA"),
    "B missing": Damage("lora_B.weight", gone, "has the tensors lora_A.weight; only plain LoRA"),
}

EVERY = [
    pytest.param(name, damage, id=f"{name}: {kind}")
    for name, damages in (
        ("sparsegrad", SPARSEGRAD),
        ("sparsegrad-identity", IDENTITY),
        ("sparsegrad-dynamic", DYNAMIC),
        ("graddrop-sparse", GRADDROP),
        ("lora", LORA),
    )
    for kind, damage in damages.items()
]


@pytest.mark.parametrize(("name", "damage"), EVERY)
def test_damaged_file_ends_in_one_sentence(shelf, copied, refused, name, damage):
    path = copied(name)
    damage(path)
    whole, other = shelf.adapter(name), shelf.adapter("lora" if name != "lora" else "sparsegrad")
    for words in (("inspect", path), ("inspect", path, "--json"), ("diff", path, whole), ("diff", whole, path)):
        message = refused(*words)
        assert damage.message in message
        assert str(path) in message
    assert damage.message in refused("diff", path, other)  # of another method
    assert damage.message in refused("diff", other, path)


def test_rank_of_zero_is_damage(copied, refused, shelf):
    path = copied("lora")
    changed("lora_A.weight", lambda t: t[:0])(path)
    changed("lora_B.weight", lambda t: t[:, :0])(path)
    for words in (("inspect", path), ("diff", path, shelf.adapter("lora"))):
        assert f"lora_A of shape (0, 64) and lora_B of shape (32, 0), {RANKS}" in refused(*words)


SAME_SIZE = {
    "turned": lambda t: t.flip(0),
    "flat": lambda t: t.prod(dtype=t.dtype)[None],
    "of three dimensions": lambda t: torch.cat([t, torch.ones_like(t[:1])]),
}


@pytest.mark.parametrize("kind", SAME_SIZE)
def test_shape_of_as_many_entries_is_found_beside_another_adapter(shelf, copied, command, refused, kind):
    """The file alone cannot tell: `inspect` says what is in it, and `diff` that it is for no such weight."""
    path = copied("graddrop-sparse")
    changed(f"{DELTA}_shape", SAME_SIZE[kind])(path)
    assert command("inspect", path).code == 0
    assert "in A and (32, 64) in B" in refused("diff", path, shelf.adapter("graddrop"))
    assert "(32, 64) in A and" in refused("diff", shelf.adapter("graddrop"), path)
    for words in ((path, shelf.adapter("lora")), (shelf.adapter("lora"), path)):
        assert "not of a weight of shape (32, 64)" in refused("diff", *words)


@pytest.mark.parametrize("name", ["sparsegrad", "graddrop", "lora"])
def test_file_without_a_tensor_of_its_method_is_refused(shelf, copied, refused, name):
    path = copied(name)
    save_file({"base_model.model.lm_head.weight": torch.ones(2, 2)}, path / WEIGHTS)
    for words in (("inspect", path), ("diff", path, shelf.adapter(name))):
        assert "holds no tensor of" in refused(*words)


def test_file_of_another_method_is_refused(shelf, copied, refused):
    path = copied("sparsegrad")
    save_file(load_file(shelf.adapter("lora") / WEIGHTS), path / WEIGHTS)
    assert "holds no tensor of SparseGrad" in refused("inspect", path)


SETTINGS = {
    "sparsegrad": ({"density": 0}, "`density` must be in"),
    "lora": ({"target_modules": "down_proj", "layers_to_transform": [0]}, "`layers_to_transform`"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_contradict_each_other_are_refused(shelf, copied, refused, name):
    path, (settings, message) = copied(name), SETTINGS[name]
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    for words in (("inspect", path), ("diff", path, shelf.adapter(name))):
        found = refused(*words)
        assert f"the settings in {path} cannot be used" in found
        assert message in found


@pytest.mark.parametrize("name", ["sparsegrad", "graddrop-sparse"])
def test_wrong_checksum_is_refused(shelf, copied, refused, name):
    path = copied(name)
    data = bytearray((path / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (path / WEIGHTS).write_bytes(data)
    for words in (("inspect", path), ("diff", path, shelf.adapter(name)), ("diff", shelf.adapter(name), path)):
        assert f"{WEIGHTS}' is damaged: the checksum of its tensors is" in refused(*words)
