"""`peft-sparsegrad diff`: distances and overlaps, held against the models themselves."""

import pytest
import torch
from cli_tools import WEIGHTS, deltas
from safetensors.torch import load_file, save_file

from peft_sparsegrad.cli.diff import diff_adapters
from peft_sparsegrad.functional import pack_support
from peft_sparsegrad.sparsegrad.layer import layer_adapters

PAIRS = [
    ("sparsegrad", "sparsegrad-2"),
    ("sparsegrad", "sparsegrad-full"),
    ("sparsegrad-dynamic", "sparsegrad-patterns"),
    ("sparsegrad", "lora"),
    ("lora", "lora-rs"),
    ("sparsegrad-identity", "lora"),
    ("sparsegrad-identity", "sparsegrad-identity-2"),
    ("sparsegrad", "graddrop"),
    ("graddrop", "lora"),
    ("sparsegrad-gpt2", "graddrop-gpt2"),
]


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_distances_are_those_of_the_deltas(shelf, a, b):
    found = diff_adapters(shelf.adapter(a), shelf.adapter(b))
    delta_a, delta_b = deltas(shelf.model(a)), deltas(shelf.model(b))
    assert {layer.module for layer in found.layers} == set(delta_a)
    for layer in found.layers:
        one, other = delta_a[layer.module], delta_b[layer.module]
        assert layer.distance == pytest.approx(((one - other).norm() / one.norm()).item(), rel=1e-3)
        cosine = torch.cosine_similarity(one.flatten(), other.flatten(), dim=0).item()
        assert layer.cosine == pytest.approx(cosine, abs=1e-4)
    one, other = (torch.cat([each[name].flatten() for name in delta_a]) for each in (delta_a, delta_b))
    assert found.distance == pytest.approx(((one - other).norm() / one.norm()).item(), rel=1e-3)
    assert found.cosine == pytest.approx(torch.cosine_similarity(one, other, dim=0).item(), abs=1e-4)
    assert not found.same


def test_graddrop_distances_and_overlap(shelf):
    found = diff_adapters(shelf.adapter("graddrop"), shelf.adapter("graddrop-sparse"))
    tensors = load_file(shelf.adapter("graddrop-sparse") / WEIGHTS)
    for layer in found.layers:
        assert layer.overlap == pytest.approx(0.1, abs=0.01)  # a tenth was saved of what changed everywhere
        assert 0 < layer.distance < 1
        assert layer.product == pytest.approx(layer.norm_b**2, rel=1e-5)  # what was saved is a part of the whole
    assert any(key.endswith("_support") for key in tensors)


def test_overlap_of_supports_in_one_basis(shelf, copied):
    path = copied("sparsegrad")
    tensors = load_file(path / WEIGHTS)
    key = "base_model.model.model.layers.1.mlp.up_proj.sparsegrad_adapter.support"
    adapters = layer_adapters(shelf.model("sparsegrad"), "default")
    adapter = next(each for each in adapters if each.plan.name == "model.layers.1.mlp.up_proj")
    indices = adapter.indices
    free = next(i for i in range(adapter.plan.num_entries) if i not in indices)
    moved = torch.cat([indices[1:], torch.tensor([free])]).sort().values
    tensors[key] = pack_support(moved, adapter.plan.num_entries)
    save_file(tensors, path / WEIGHTS)
    found = diff_adapters(shelf.adapter("sparsegrad"), path)
    assert found.supports is None
    overlaps = {each.module: each.overlap for each in found.layers}
    assert overlaps.pop("model.layers.1.mlp.up_proj") == (len(indices) - 1) / (len(indices) + 1)
    assert set(overlaps.values()) == {1.0}


def test_supports_in_other_bases_are_not_compared(shelf, command):
    result = command("diff", shelf.adapter("sparsegrad"), shelf.adapter("sparsegrad-2"))
    assert result.code == 1
    assert "6 of 6 layers have another basis" in result.out
    found = command("diff", shelf.adapter("sparsegrad"), shelf.adapter("sparsegrad-dynamic"), "--json").json
    assert {layer["overlap"] for layer in found["layers"]} == {None}


def test_the_same_adapter_ends_in_0(shelf, copied, command):
    for name in ("sparsegrad", "graddrop-sparse", "ia3"):
        result = command("diff", shelf.adapter(name), copied(name))
        assert (result.code, result.out) == (0, "The adapters are the same.\n")


def test_settings_and_other_tensors(shelf, copied, command):
    path = copied("sparsegrad-bert")
    tensors = load_file(path / WEIGHTS)
    tensors["base_model.model.classifier.bias"] += 1
    save_file(tensors, path / WEIGHTS)
    config = path / "adapter_config.json"
    config.write_text(config.read_text().replace('"renewal_steps": 25', '"renewal_steps": 7'))
    result = command("diff", shelf.adapter("sparsegrad-bert"), path, "--json")
    assert result.code == 1
    assert result.json["config"] == {"renewal_steps": [25, 7]}
    assert [each["name"] for each in result.json["tensors"]] == ["classifier.bias"]
    assert result.json["distance"] == 0
    table = command("diff", shelf.adapter("sparsegrad-bert"), path).out
    assert "classifier.bias" in table
    assert "renewal_steps" in table


def test_other_methods_are_compared_tensor_by_tensor(shelf, command):
    result = command("diff", shelf.adapter("ia3"), shelf.adapter("ia3-2"), "--json")
    assert (result.code, result.json["distance"], result.json["layers"]) == (1, None, [])
    found = load_file(shelf.adapter("ia3") / WEIGHTS)
    assert len(result.json["tensors"]) == len(found)


def test_what_cannot_be_compared_ends_in_one_sentence(shelf, copied, refused):
    message = refused("diff", shelf.adapter("lora"), shelf.adapter("lora-attention"))
    assert "different layers: only" in message
    assert "'model.layers.0.mlp.down_proj' and 5 more" in message
    assert "cannot be compared" in refused("diff", shelf.adapter("lora"), shelf.adapter("ia3"))
    assert "in A and (32, 8) in B" in refused("diff", shelf.adapter("lora-attention"), _other_shape(copied))
    path = without_base(copied("graddrop"), shelf)
    assert "no/such/model" in refused("diff", path, shelf.adapter("sparsegrad"))


def without_base(path, shelf):
    """The adapter, which now names a base model that is not there."""
    config = path / "adapter_config.json"
    config.write_text(config.read_text().replace(str(shelf.saved_base()), "no/such/model"))
    return path


def test_own_basis_needs_no_base_model(shelf, copied, command):
    path = without_base(copied("sparsegrad-identity"), shelf)
    found = command("diff", path, shelf.adapter("sparsegrad-identity-2"), "--json").json
    assert all(0 <= layer["overlap"] <= 1 for layer in found["layers"])
    models = [shelf.model(name).get_base_model() for name in ("sparsegrad-identity", "sparsegrad-identity-2")]
    for layer in found["layers"]:
        a, b = (model.get_submodule(layer["module"]).get_delta_weight("default") for model in models)
        assert layer["distance"] == pytest.approx(((a - b).norm() / a.norm()).item(), rel=1e-5)


def _other_shape(copied):
    path = copied("lora-attention")
    tensors = load_file(path / WEIGHTS)
    tensors = {key: t[:, :8].contiguous() if "lora_A" in key else t for key, t in tensors.items()}
    save_file(tensors, path / WEIGHTS)
    return path


def test_plain_lora_only(copied, shelf, refused):
    path = copied("lora")
    tensors = load_file(path / WEIGHTS)
    key = next(key for key in sorted(tensors) if "lora_B" in key)
    tensors[key.replace("lora_B.weight", "lora_magnitude_vector")] = torch.ones(3)
    save_file(tensors, path / WEIGHTS)
    assert "only plain LoRA of linear layers" in refused("diff", path, shelf.adapter("lora"))
