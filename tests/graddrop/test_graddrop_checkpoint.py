"""The adapter file: what is in it, what it costs, and what happens when it is damaged."""

import json
import re
from pathlib import Path

import pytest
import torch
from fresh import run_program
from graddrop_tools import adamw, deltas, dropped, graddrop_layers, loss_of, masks_of, sgd, step, tower
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import batch, bert, llama, logits, train

from peft_sparsegrad import GradDrop, GradDropConfig
from peft_sparsegrad.functional import packed_support_size
from peft_sparsegrad.graddrop.variants import VARIANTS

TESTS = Path(__file__).parent.parent
FILE = "adapter_model.safetensors"


# In another process


def fresh():
    return dropped()


def one_step(variant):
    model = dropped(variant=variant, num_epochs=3)
    GradDrop(model).set_epoch(1)
    train(model, steps=1)
    return model


def half_finished():
    model = dropped(variant="GradDrop-Epoch", num_epochs=4)
    graddrop = GradDrop(model)
    for epoch in range(2):
        graddrop.set_epoch(epoch)
        train(model, steps=3)
    return model


def bf16():
    model = dropped(llama().to(torch.bfloat16))
    train(model, steps=2)
    return model


def token_rows():
    model = dropped(trainable_token_indices=[3, 5])
    train(model, steps=2)
    return model


def two_layers():
    model = dropped(layers_to_transform=[0, 2])
    train(model, steps=1)
    return model


CASES = {
    "fresh": fresh,
    **{name: lambda name=name: one_step(name) for name in VARIANTS},
    "half-finished": half_finished,
    "bf16 base": bf16,
    "token rows": token_rows,
    "two layers only": two_layers,
}


@pytest.fixture(scope="module")
def seen_in_a_fresh_process(tmp_path_factory):
    """Case to whether another process, which loads the adapter, gets the same logits to the last bit."""
    root = tmp_path_factory.mktemp("adapters")
    for number, make in enumerate(CASES.values()):
        torch.manual_seed(0)
        model = make()
        model.save_pretrained(root / str(number))
        torch.save(logits(model), root / f"{number}.pt")
    code = """
import sys, torch, peft_sparsegrad
torch.set_num_threads(1)
from pathlib import Path
from peft import PeftModel
from tiny import llama, logits
root = Path(sys.argv[1])
for number in range(int(sys.argv[2])):
    expected = torch.load(root / f"{number}.pt")
    loaded = PeftModel.from_pretrained(llama().to(expected.dtype), root / str(number))
    print("equal", number, torch.equal(logits(loaded), expected))
"""
    done = run_program("-c", code, root, len(CASES))
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, re.findall(r"equal \d+ (\w+)", done.stdout), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_fresh_process_computes_the_same(seen_in_a_fresh_process, case):
    assert seen_in_a_fresh_process[case] == "True"


# What is stored


@pytest.fixture
def model():
    """An adapter whose deltas a test fills."""
    return dropped(tower(num_blocks=1, dtype=torch.float32), target_modules=["up", "down"])


WEIGHT = "base_model.model.layers.0.up.graddrop_adapter.weight_delta"  # 16 × 8


def fill(delta, count):
    with torch.no_grad():
        flat = torch.zeros(delta.numel())
        flat[torch.randperm(delta.numel())[:count]] = torch.arange(1.0, count + 1)
        delta.copy_(flat.view(delta.shape))


def saved(model, path):
    model.save_pretrained(path)
    return load_file(path / FILE)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 64, 123, 124, 127, 128])
def test_form_that_takes_the_fewest_bytes_is_chosen(model, tmp_path, count):
    fill(deltas(model)["layers.0.up.weight"], count)
    tensors = saved(model, tmp_path)
    parts = {key: tensor for key, tensor in tensors.items() if key.startswith(WEIGHT)}
    size = sum(tensor.numel() * tensor.element_size() for tensor in parts.values())
    dense = 4 * 128
    assert size == min(dense, 4 * count + packed_support_size(128, count) + 8)  # 8 for the shape
    if size == dense:
        assert parts.keys() == {WEIGHT}
        assert parts[WEIGHT].shape == (16, 8)
    else:
        assert parts.keys() == {WEIGHT, f"{WEIGHT}_support", f"{WEIGHT}_shape"}
        assert parts[f"{WEIGHT}_shape"].tolist() == [16, 8]
        assert parts[f"{WEIGHT}_support"].dtype == torch.uint8
        flat = deltas(model)["layers.0.up.weight"].detach().flatten()
        assert torch.equal(parts[WEIGHT], flat[flat != 0])


def test_bf16_values_count_two_bytes(tmp_path):
    base = tower(num_blocks=1, dtype=torch.bfloat16)
    model = get_peft_model(base, GradDropConfig(target_modules=["up"]), autocast_adapter_dtype=False)
    for count, dense in ((115, False), (116, True)):  # 2 · 115 + 16 + 8 < 256 <= 2 · 116 + 16 + 8
        fill(deltas(model)["layers.0.up.weight"], count)
        assert (f"{WEIGHT}_support" not in saved(model, tmp_path)) is dense


def test_untrained_adapter_takes_next_to_nothing(tmp_path):
    model = dropped()
    model.save_pretrained(tmp_path)
    assert (tmp_path / FILE).stat().st_size < 450 * len(deltas(model)), "names of three tensors each"


@pytest.mark.parametrize("count", [0, 1, 5, 64, 128])
def test_every_form_is_read_again(model, tmp_path, count):
    for delta in deltas(model).values():
        fill(delta, min(count, delta.numel()))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tower(num_blocks=1, dtype=torch.float32), tmp_path)
    assert all(torch.equal(deltas(loaded)[name], delta) for name, delta in deltas(model).items())


def test_keys_are_those_of_peft_without_the_adapters_name(model, tmp_path):
    fill(deltas(model)["layers.0.up.weight"], 5)
    model.add_adapter("other", GradDropConfig(target_modules=["up"]))
    model.save_pretrained(tmp_path)
    keys = {*load_file(tmp_path / FILE), *load_file(tmp_path / "other" / FILE)}
    module = r"base_model\.model\.layers\.0\.(up|down)\.graddrop_adapter"
    assert all(re.fullmatch(rf"{module}\.((weight|bias)_delta(_support|_shape)?|num_steps)", key) for key in keys)
    assert [key for key in keys if "steps" in key] == ["base_model.model.layers.0.up.graddrop_adapter.num_steps"]


def test_saving_leaves_the_model_as_it_is(model, tmp_path):
    model.peft_config["default"].save_density = 0.1
    fill(deltas(model)["layers.0.up.weight"], 64)
    before = {name: delta.detach().clone() for name, delta in deltas(model).items()}
    model.save_pretrained(tmp_path)
    assert all(torch.equal(deltas(model)[name], delta) for name, delta in before.items())


@pytest.mark.parametrize("sparse", [False, True])
def test_other_modules_are_saved_in_full(tmp_path, sparse):
    """Also where they are mostly zeros, as a fresh head's bias is."""
    model = dropped(bert(), modules_to_save=["classifier"])
    with torch.no_grad():
        for parameter in model.base_model.model.classifier.modules_to_save["default"].parameters():
            parameter.zero_() if sparse else parameter.normal_()
    tensors = saved(model, tmp_path)
    assert {tuple(t.shape) for key, t in tensors.items() if "classifier" in key} == {(2, 32), (2,)}
    assert torch.equal(logits(PeftModel.from_pretrained(bert(), tmp_path)), logits(model))


# save_density


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0, 1e-6])
def test_save_density_keeps_exactly_the_largest(tmp_path, density):
    model = dropped(tower(dtype=torch.float32), save_density=density, init_weights=False)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tower(dtype=torch.float32), tmp_path)
    for name, delta in deltas(model).items():
        count = max(1, round(density * delta.numel()))
        threshold = delta.abs().flatten().sort(descending=True).values[count - 1]
        expected = torch.where(delta.abs() >= threshold, delta, torch.zeros(()))
        assert torch.equal(deltas(loaded)[name], expected)
        assert torch.count_nonzero(deltas(loaded)[name]) == count


def kept_energy(model, density):
    kept = total = 0.0
    for delta in deltas(model).values():
        squares = delta.detach().double().square().flatten().sort(descending=True).values
        kept += squares[: max(1, round(density * squares.numel()))].sum().item()
        total += squares.sum().item()
    return kept / total


def test_model_card_says_what_was_left_out(tmp_path):
    model = dropped(tower(dtype=torch.float32), save_density=0.25, init_weights=False)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text("utf-8")
    assert card.count("## What was left out of this file") == 1
    assert "`save_density=0.25`: of each tensor's changes only the largest 25.00% were saved." in card
    assert f"They hold {kept_energy(model, 0.25):.2%} of the squared norm of all changes" in card
    assert "library_name: peft" in card


def test_second_save_rewrites_the_section(tmp_path):
    model = dropped(tower(dtype=torch.float32), save_density=0.25, init_weights=False)
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    card.write_text(card.read_text("utf-8") + "\n## My own section\n\nwith words\n", "utf-8")
    first = card.read_text("utf-8")
    model.peft_config["default"].save_density = 0.5
    model.save_pretrained(tmp_path)
    second = card.read_text("utf-8")
    assert second.count("## What was left out of this file") == 1
    assert f"{kept_energy(model, 0.25):.2%}" in first
    assert f"{kept_energy(model, 0.25):.2%}" not in second
    assert f"{kept_energy(model, 0.5):.2%}" in second
    assert second.count("## My own section\n\nwith words") == 1
    model.save_pretrained(tmp_path)
    assert card.read_text("utf-8") == second


def test_no_section_without_save_density(tmp_path):
    dropped(tower(dtype=torch.float32), init_weights=False).save_pretrained(tmp_path)
    assert "left out" not in (tmp_path / "README.md").read_text("utf-8")


def test_section_is_taken_out_when_everything_is_saved(tmp_path):
    model = dropped(tower(dtype=torch.float32), save_density=0.25, init_weights=False)
    model.save_pretrained(tmp_path)
    model.peft_config["default"].save_density = None
    model.save_pretrained(tmp_path)
    assert "left out" not in (tmp_path / "README.md").read_text("utf-8")


def test_untrained_adapter_loses_nothing(tmp_path):
    dropped(tower(dtype=torch.float32), save_density=0.25).save_pretrained(tmp_path)
    assert "left out" not in (tmp_path / "README.md").read_text("utf-8")


def test_configuration_saved_by_itself_states_nothing(tmp_path):
    GradDropConfig(save_density=0.25).save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_adapter_that_is_loaded_and_saved_again_keeps_what_its_card_says(tmp_path):
    dropped(tower(dtype=torch.float32), save_density=0.25, init_weights=False).save_pretrained(tmp_path)
    section = (tmp_path / "README.md").read_text("utf-8").split("## What was left out")[1].strip()
    PeftModel.from_pretrained(tower(dtype=torch.float32), tmp_path).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text("utf-8").split("## What was left out")[1].strip() == section


def test_save_density_is_read_again(tmp_path):
    dropped(tower(dtype=torch.float32), save_density=0.25).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tower(dtype=torch.float32), tmp_path)
    assert loaded.peft_config["default"].save_density == 0.25


# Damage


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


# Ways to load


@pytest.fixture(params=["dense", "sparse"])
def trained_and_saved(request, tmp_path):
    model = dropped(variant="GradDrop" if request.param == "dense" else "GradDrop-Epoch-Toggle", num_epochs=3)
    GradDrop(model).set_epoch(0)
    train(model, steps=4, optimizer=adamw(model))
    has_supports = any(key.endswith("_support") for key in saved(model, tmp_path))
    assert has_supports is (request.param == "sparse")
    return model, tmp_path


def test_from_pretrained(trained_and_saved):
    model, path = trained_and_saved
    loaded = PeftModel.from_pretrained(llama(), path)
    assert torch.equal(logits(loaded), logits(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_load_adapter_into_an_existing_name(trained_and_saved):
    model, path = trained_and_saved
    other = dropped(variant="GradDrop", init_weights=False)
    other.load_adapter(path, "default")
    assert torch.equal(logits(other), logits(model))


def test_training_goes_on_after_the_best_adapter_is_loaded_again(trained_and_saved):
    model, path = trained_and_saved
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.train()
    train(model, steps=1)
    model.load_adapter(path, "default", is_trainable=True)
    assert all(a is b for a, b in zip([p for p in model.parameters() if p.requires_grad], parameters, strict=True))
    train(model, steps=1)


def test_load_a_second_adapter_and_delete_the_first(trained_and_saved):
    model, path = trained_and_saved
    other = dropped(variant="GradDrop", init_weights=False, seed=4)
    first = logits(other)
    other.load_adapter(path, "second")
    assert torch.equal(logits(other), first)
    other.set_adapter("second")
    assert torch.equal(logits(other), logits(model))
    other.delete_adapter("default")
    assert torch.equal(logits(other), logits(model))
    assert not any("default" in key for key in other.state_dict())


def test_merge_and_unload_after_loading(trained_and_saved):
    model, path = trained_and_saved
    merged = PeftModel.from_pretrained(llama(), path).merge_and_unload()
    assert not graddrop_layers(merged)
    assert torch.allclose(logits(merged), logits(model), atol=1e-5)


def test_unload_gives_the_base_model_back(trained_and_saved):
    _, path = trained_and_saved
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), path).unload()), logits(llama()))


@pytest.mark.parametrize("prefix", [True, False])
def test_state_dict_with_and_without_pefts_prefix(trained_and_saved, prefix):
    model, _ = trained_and_saved
    tensors = get_peft_model_state_dict(model)
    assert all(key.startswith("base_model.model.") for key in tensors)
    if prefix:
        other = dropped(variant="GradDrop")
        set_peft_model_state_dict(other, tensors)
    else:
        other = llama()
        other.add_adapter(GradDropConfig())
        set_peft_model_state_dict(other, {k.removeprefix("base_model.model."): v for k, v in tensors.items()})
    assert torch.equal(logits(other), logits(model))


def test_trained_and_saved_through_transformers_loads_in_peft(tmp_path):
    model = llama()
    model.add_adapter(GradDropConfig.from_variant("GradDrop", p=0.9))
    train(model, steps=1)
    model.save_pretrained(tmp_path)
    assert any(key.endswith("_support") for key in load_file(tmp_path / FILE))
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))


def test_transformers_own_loading_takes_full_tensors_and_refuses_sparse_ones(trained_and_saved):
    """It reads the file without asking PEFT: a sparse file must not become a model without its changes."""
    model, path = trained_and_saved
    loaded = llama()
    if any(key.endswith("_support") for key in load_file(path / FILE)):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            loaded.load_adapter(str(path))
    else:
        loaded.load_adapter(str(path))
        assert torch.equal(logits(loaded), logits(model))


def test_bf16_adapter_round_trip(tmp_path):
    config = GradDropConfig(p=0.5)
    model = get_peft_model(llama().to(torch.bfloat16), config, autocast_adapter_dtype=False)
    train(model, steps=1, lr=0.1)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / FILE)
    assert {t.dtype for k, t in stored.items() if not k.endswith(("_support", "_shape", "_steps"))} == {torch.bfloat16}
    loaded = PeftModel.from_pretrained(llama().to(torch.bfloat16), tmp_path, autocast_adapter_dtype=False)
    assert all(torch.equal(deltas(loaded)[name], delta) for name, delta in deltas(model).items())
    assert torch.equal(logits(loaded), logits(model))


def test_adapter_saved_in_float32_loads_on_a_bf16_base_in_float32(tmp_path):
    model = dropped()
    train(model, steps=1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama().to(torch.bfloat16), tmp_path)
    assert all(torch.equal(deltas(loaded)[name], delta) for name, delta in deltas(model).items())


def test_resumed_adapter_draws_the_masks_of_the_saved_settings(tmp_path):
    model = dropped(tower(), variant="Layer-GradDrop", p=0.5, seed=9)
    optimizer = sgd(model)
    for seed in range(3):
        step(model, optimizer, seed)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tower(), tmp_path, is_trainable=True)
    step(model, optimizer, 3)
    step(loaded, sgd(loaded), 3)
    assert masks_of(model).step == masks_of(loaded).step == 3
    assert all(torch.equal(deltas(loaded)[name], delta) for name, delta in deltas(model).items())


def test_loading_for_inference_needs_no_epoch(tmp_path):
    model = dropped(tower(), variant="GradDrop-Epoch")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tower(), tmp_path)
    assert torch.equal(loss_of(loaded), loss_of(tower()))


def test_configuration_file_lists_the_targets_that_were_found(tmp_path):
    model = dropped(layers_to_transform=[1])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == 9
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert graddrop_layers(loaded).keys() == graddrop_layers(model).keys()


def test_loss_of_a_loaded_adapter(trained_and_saved):
    model, path = trained_and_saved
    loaded = PeftModel.from_pretrained(llama(), path)
    with torch.no_grad():
        assert loaded(**batch()).loss == model(**batch()).loss
