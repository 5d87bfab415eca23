"""What holds for every method in the table."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from experiments.methods import METHODS, lora_rank, targeted
from peft_sparsegrad import GradDrop, SparseGradConfig

DENSITY = 0.05
EVERY = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
BLOCK = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
         "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm")  # fmt: skip
MLP = {f"bert.encoder.layer.{i}.{side}.dense" for i in (0, 1) for side in ("intermediate", "output")}


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(vocab_size=30, **sizes, **dropout))


def attach(method, target_modules=None, **overrides) -> nn.Module:
    torch.manual_seed(1)
    ours = method.name in SparseGradConfig.variants
    return method.attach(bert(), target_modules, DENSITY, **({"warmup_steps": 0} if ours else {}), **overrides)


def optimizer_for(method, model, lr: float):
    if method.make_optimizer is not None:
        return method.make_optimizer(model, lr)
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)


def train(method, model, steps: int, lr: float = 5e-3) -> list[float]:
    """Losses on one batch, before each step and after the last."""
    if is_graddrop(method):
        GradDrop(model, num_epochs=2).set_epoch(1)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 30, (8, 6), generator=generator)
    batch = {"input_ids": ids, "labels": torch.arange(8) % 2}
    optimizer, losses = optimizer_for(method, model, lr), []
    for _ in range(steps):
        losses.append(model(**batch).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    return [*(loss.item() for loss in losses), model(**batch).loss.item()]


def trainable(model) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def num_trainable(model) -> int:
    return sum(parameter.numel() for parameter in trainable(model).values())


def base_weights(model) -> dict[str, torch.Tensor]:
    """The weights that the model had before the method came, under their own names."""
    marks = ("sparsegrad_", "graddrop_", "lora_", "shira_", "supertuning_", "modules_to_save")
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor.clone()
        for name, tensor in model.state_dict().items()
        if not any(mark in name for mark in marks)
    }


@EVERY
def test_steps_lower_the_loss(method):
    losses = train(method, attach(method), steps=15, lr=5e-3 if is_graddrop(method) else 0.05)
    assert losses[1] < losses[0]
    assert losses[-1] < 0.98 * losses[0]


@EVERY
def test_one_step_changes_what_trains(method):
    model = attach(method)
    before = {name: parameter.detach().clone() for name, parameter in trainable(model).items()}
    train(method, model, steps=1)
    moved = {name for name, parameter in trainable(model).items() if not torch.equal(parameter, before[name])}
    expected = {name for name in before if "lora_A" not in name}  # LoRA's B is zero: A has no gradient yet
    if method.name == "gradfreeze-toggle-topdown":  # in the second of two epochs
        expected = {name for name in before if "layer.0." in name}
    assert moved == expected
    assert moved


@EVERY
def test_base_weights_are_untouched(method):
    model = attach(method)
    train(method, model, steps=3)
    before, after = bert().state_dict(), base_weights(model)
    assert before.keys() == after.keys()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == ({f"{name}.{part}" for name in MLP for part in ("weight", "bias")} if is_full(method) else set())


def is_full(method) -> bool:
    return method.name == "full"


def is_graddrop(method) -> bool:
    return "grad" in method.name and "sparsegrad" not in method.name


@EVERY
def test_the_default_modules_are_adapted(method):
    blocks = {f"bert.encoder.layer.{i}.{module}" for i in (0, 1) for module in BLOCK}
    expected = blocks if is_graddrop(method) else MLP
    names = {name.removeprefix("base_model.model.") for name in trainable(attach(method))}
    assert {next(module for module in expected if name.startswith(f"{module}.")) for name in names} == expected


def test_sparsegrad_trains_the_density_to_the_value():
    assert num_trainable(attach(METHODS["sparsegrad"])) == num_trainable(attach(METHODS["meprop"])) == 4 * 102


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("name", ["sparsegrad", "meprop", "lora", "shira", "supertuning"])
def test_sparse_methods_and_lora_train_as_many_values(name, rank):
    density = 1.02 * rank * (32 + 64) / (32 * 64)  # which an integer rank cannot meet exactly
    settings = {"warmup_steps": 0} if name in ("sparsegrad", "meprop") else {}
    model = METHODS[name].attach(bert(), None, density, **settings)
    assert num_trainable(model) == pytest.approx(density * 4 * 32 * 64, rel=0.05)


def test_shira_has_the_rank_that_is_closest_over_all_shapes():
    model = METHODS["shira"].attach(bert(), ["intermediate.dense", "key"], 0.2)
    assert num_trainable(model) == 2 * 4 * ((32 + 64) + (32 + 32))  # 3.84 of 0.2 (32 64 + 32 32)


def test_the_seed_draws_shiras_mask():
    masks = [shira_mask(seed) for seed in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def shira_mask(seed: int) -> torch.Tensor:
    model = METHODS["shira"].attach(bert(), None, DENSITY, seed=seed)
    return next(m.shira_indices["default"] for m in model.modules() if hasattr(m, "shira_indices"))


def test_full_takes_no_unknown_setting():
    with pytest.raises(TypeError, match="rank"):
        METHODS["full"].attach(bert(), None, DENSITY, rank=3)


@pytest.mark.parametrize("density", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("shape", [(384, 1536), (1536, 384), (4096, 11008), (768, 768)])
def test_lora_rank_is_the_closest(shape, density):
    wanted, each = density * shape[0] * shape[1], sum(shape)
    rank = lora_rank(*shape, density)
    assert abs(rank * each - wanted) <= min(abs((rank + d) * each - wanted) for d in (-1, 1))


def test_lora_has_the_rank_of_each_shape():
    model = METHODS["lora"].attach(bert(), ["intermediate.dense", "key"], 0.2)
    ranks = {n: p.shape[0] for n, p in model.named_parameters() if "lora_A" in n}
    assert {rank for name, rank in ranks.items() if ".key." in name} == {lora_rank(32, 32, 0.2)} == {3}
    assert {rank for name, rank in ranks.items() if "intermediate" in name} == {lora_rank(32, 64, 0.2)} == {4}
    scalings = {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")}
    assert scalings == {1.0}


@pytest.mark.parametrize("method", [m for m in METHODS.values() if not is_full(m)], ids=lambda m: m.name)
def test_reloaded_adapter_gives_the_same_output(method, tmp_path):
    model = attach(method, modules_to_save=["classifier"])
    assert isinstance(model, PeftModel)
    train(method, model, steps=3, lr=0.05)
    ids = torch.arange(12).view(2, 6)
    expected = model.eval()(input_ids=ids).logits
    with model.disable_adapter():
        assert not torch.allclose(model(input_ids=ids).logits, expected, atol=1e-2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bert(), tmp_path).eval()
    assert torch.equal(loaded(input_ids=ids).logits, expected)


@EVERY
def test_modules_to_save_train_too(method):
    model = attach(method, modules_to_save=["classifier"])
    names = [name for name in trainable(model) if "classifier" in name]
    assert len(names) == 2
    before = {name: trainable(model)[name].detach().clone() for name in names}
    train(method, model, steps=1)
    assert not any(torch.equal(trainable(model)[name], before[name]) for name in names)


@EVERY
def test_target_that_matches_nothing(method):
    with pytest.raises(ValueError, match="no_such_layer"):
        attach(method, ["no_such_layer"])


def test_targeted_are_the_modules_that_sparsegrad_adapts():
    model = bert()
    assert {name for name, _ in targeted(model, None)} == MLP
    assert all(model.get_submodule(name) is module for name, module in targeted(model, None))
    assert {name for name, _ in targeted(model, ["key"])} == {
        f"bert.encoder.layer.{i}.attention.self.key" for i in (0, 1)
    }
    assert {name for name, _ in targeted(model, r".*layer\.1\.intermediate\.dense")} == {
        "bert.encoder.layer.1.intermediate.dense"
    }


def test_every_method_starts_at_the_same_model():
    ids = torch.arange(12).view(2, 6)
    expected = bert().eval()(input_ids=ids).logits
    for method in METHODS.values():
        assert torch.equal(attach(method).eval()(input_ids=ids).logits, expected), method.name


def test_names_are_the_keys_and_descriptions_are_one_line():
    for name, method in METHODS.items():
        assert method.name == name
        assert method.description
        assert "\n" not in method.description
