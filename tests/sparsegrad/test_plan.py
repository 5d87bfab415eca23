"""What is planned for each layer, and that nothing is changed where a plan fails."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import BertConfig, BertModel
from transformers.pytorch_utils import Conv1D

from peft_sparsegrad import SparseGradConfig, SparseGradLinear


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(16, 40), nn.Linear(40, 16), nn.LayerNorm(16)


class Model(nn.Module):
    """Three blocks of (40, 16) and (16, 40), a square head, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(16, 16)


def attach(model: nn.Module, **settings) -> nn.Module:
    settings = {"target_modules": ["up", "down"], "warmup_steps": 0, **settings}
    return get_peft_model(model, SparseGradConfig(**settings))


def layers(model: nn.Module) -> dict[str, SparseGradLinear]:
    found = {n: m for n, m in model.named_modules() if isinstance(m, SparseGradLinear)}
    return {name.removeprefix("base_model.model."): module for name, module in found.items()}


def plans(model: nn.Module) -> dict:
    return {name: layer.adapter(layer.active_adapters[0]).plan for name, layer in layers(model).items()}


def refuse(exception: type, match: str, **settings) -> None:
    """Attaching raises, and every module of the model is the one that it was."""
    model = Model()
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(exception, match=match):
        attach(model, **settings)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "kind"), [("embedding", "Embedding"), ("norm", "LayerNorm"), ("blocks", "ModuleList"), ("2", "Block")]
)
def test_module_that_is_not_linear(name, kind):
    refuse(TypeError, rf"'(blocks\.\d\.)?{name}' is a {kind}|'blocks\.2' is a Block", target_modules=["up", name])


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 4, "num_values": 17},
        {"rank": 4, "density": 0.5},
        {"rank_pattern": {"down": (2, 2)}, "num_values": 5},
        {"density_pattern": {"down": 0.9}, "rank": 10},
    ],
)
def test_more_values_than_the_core_holds(settings):
    refuse(ValueError, r"module 'blocks\.0\.(up|down)'.*cannot hold \d+ values: raise `rank` to at least", **settings)


def test_more_values_than_the_layer_has():
    refuse(ValueError, r"module 'blocks\.0\.up'.*641 values do not fit", num_values=641)


def test_failure_in_the_last_layer_leaves_the_first_alone():
    refuse(ValueError, r"module 'head'.*300 values do not fit", num_values=300, target_modules=["up", "head"])


def test_target_that_matches_nothing():
    refuse(ValueError, "no_such_layer", target_modules=["no_such_layer"])


@pytest.mark.parametrize(
    ("settings", "k", "core_shape"),
    [
        ({"density": 0.1}, 64, (40, 7)),
        ({"density": 0.1, "slack": 6}, 64, (40, 10)),
        ({"density": 0.1, "slack": 2}, 64, (40, 4)),
        ({"density": 0.1, "rank": (None, 7)}, 64, (40, 7)),
        ({"density": 0.1, "rank": (7, None)}, 64, (7, 16)),
        ({"num_values": 9, "rank": 3}, 9, (3, 3)),
        ({"density": 0.1, "rank": (8, 12)}, 64, (8, 12)),
        ({"density": 0.1, "rank": "full"}, 64, (40, 16)),
        ({"density": 0.1, "basis": "identity"}, 64, (40, 16)),
        ({"density": 0.1, "rank": 30}, 64, (30, 16)),
        ({"slack": 6}, 8, (40, 2)),
    ],
)
def test_values_and_core_of_a_layer(settings, k, core_shape):
    plan = plans(attach(Model(), **settings))["blocks.1.up"]
    assert (plan.k, plan.core_shape, plan.weight_shape) == (k, core_shape, (40, 16))


@pytest.mark.parametrize("support", ["static", "dynamic"])
def test_number_of_trained_values(support):
    model = attach(Model(), density=0.1, rank=12, support=support)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 6
    assert set(trained.values()) == {64 if support == "static" else 144}


def test_patterns_match_a_suffix_a_full_name_or_an_expression():
    found = plans(
        attach(
            Model(),
            density=0.1,
            density_pattern={"down": 0.2, r"blocks\.2\.up": 0.3},
            rank_pattern={r"blocks\.[01]\.up": (9, 10), "blocks.2.down": "full"},
        )
    )
    assert {name: plan.k for name, plan in found.items()} == {
        "blocks.0.up": 64,
        "blocks.1.up": 64,
        "blocks.2.up": 192,
        "blocks.0.down": 128,
        "blocks.1.down": 128,
        "blocks.2.down": 128,
    }
    assert found["blocks.0.up"].core_shape == found["blocks.1.up"].core_shape == (9, 10)
    assert found["blocks.2.up"].core_shape == (40, 16)  # 4 · 192 entries would be more than there are
    assert found["blocks.2.down"].ranks == (16, 40)
    assert found["blocks.1.down"].ranks == (None, 32)
    assert found["blocks.1.up"].ranks == (9, 10)


@pytest.mark.parametrize(("out_features", "in_features"), [(10, 20), (20, 2), (16, 4), (256, 256), (1, 1)])
def test_defaults_suit_small_layers(out_features, in_features):
    model = attach(nn.Sequential(nn.Linear(in_features, out_features)), target_modules=["0"])
    model(torch.randn(3, in_features)).sum().backward()
    assert model.base_model.model[0].adapter("default").values.grad is not None


def test_conv1d_is_planned_as_out_in():
    model = nn.Sequential(Conv1D(40, 16))
    plan = plans(attach(model, target_modules=["0"], rank=(8, 12), num_values=9))["0"]
    assert plan.weight_shape == (40, 16)
    layer = model[0]
    assert layer.adapter("default").basis.U.shape == (16, 12)
    assert layer.adapter("default").basis.V.shape == (40, 8)


# Sharing: layers with the same role, shape and core hold the very same transition matrices.


def groups(model: nn.Module) -> dict[str, int]:
    """Layer name to an index of its group, by identity."""
    seen: list = []
    found = {}
    for name, layer in layers(model).items():
        group = layer.adapter(layer.active_adapters[0]).basis
        if not any(group is other for other in seen):
            seen.append(group)
        found[name] = next(i for i, other in enumerate(seen) if group is other)
    return found


def stored(model: nn.Module, letter: str) -> list[str]:
    return [key for key in model.state_dict() if key.endswith(f".{letter}")]


def test_one_group_for_all_blocks_stored_once():
    model = attach(Model(), target_modules=["up", "down", "head"], rank=8)
    found = groups(model)
    assert len({found[f"blocks.{i}.up"] for i in range(3)}) == 1
    assert len({found[f"blocks.{i}.down"] for i in range(3)}) == 1
    assert len(set(found.values())) == 3
    assert len(stored(model, "U")) == len(stored(model, "V")) == 3


def test_layers_with_another_core_do_not_share():
    model = attach(Model(), rank=8, rank_pattern={r"blocks\.1\.up": 20})
    found = groups(model)
    assert found["blocks.0.up"] == found["blocks.2.up"] != found["blocks.1.up"]
    assert len(stored(model, "U")) == 3


@pytest.mark.parametrize(
    ("rank", "ranks", "with_V"),
    [("auto", [(None, 2), (None, 3), (None, 3)], []), ("narrower", [(None, 2), (2, None), (None, 3)], ["down"])],
)
def test_one_side_of_each_weight_has_a_matrix(rank, ranks, with_V):
    """By default the input side, and earlier the narrower one."""
    model = attach(Model(), target_modules=["up", "down", "head"], slack=6, rank=rank)
    found = plans(model)
    assert [found[name].ranks for name in ("blocks.1.up", "blocks.1.down", "head")] == ranks
    assert [key.split(".")[-4] for key in stored(model, "V")] == with_V
    assert [key.split(".")[-4] for key in stored(model, "U")] == [n for n in ("up", "down", "head") if n not in with_V]


def test_both_ranks_none_is_the_identity_basis_and_needs_that_name():
    with pytest.raises(ValueError, match=r"`rank` leaves both sides in .*: that is basis='identity'"):
        attach(Model(), rank=(None, None))


@pytest.mark.parametrize(("settings", "expected"), [({}, 25), ({"renewal_steps": 7}, 7), ({"support": "dynamic"}, 0)])
def test_only_static_supports_are_renewed(settings, expected):
    assert {plan.renewal_steps for plan in plans(attach(Model(), **settings)).values()} == {expected}


def test_bases_of_the_weights_are_not_shared():
    model = attach(Model(), basis="svd")
    assert len(set(groups(model).values())) == 6


def test_identity_basis_stores_no_matrices():
    model = attach(Model(), basis="identity")
    assert stored(model, "U") == stored(model, "V") == []


def test_two_adapters_have_matrices_of_their_own():
    model = attach(Model(), rank=8)
    config = SparseGradConfig(target_modules=["up", "down"], rank=8, warmup_steps=0)
    model.add_adapter("other", config)
    layer = layers(model)["blocks.0.up"]
    assert layer.adapter("default").basis is not layer.adapter("other").basis
    assert layers(model)["blocks.1.up"].adapter("other").basis is layer.adapter("other").basis
    assert len(stored(model, "U")) == 4


def tiny_bert() -> BertModel:
    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2}
    return BertModel(BertConfig(vocab_size=50, **sizes))


@pytest.mark.parametrize("how", ["inject_adapter_in_model", "add_adapter"])
def test_sharing_without_a_peft_model(how):
    model, config = tiny_bert(), SparseGradConfig(rank=8, warmup_steps=0)
    if how == "add_adapter":
        model.add_adapter(config)
    else:
        inject_adapter_in_model(config, model)
    found = groups(model)
    assert len(found) == 6
    assert set(found.values()) == {0, 1}
    assert len(stored(model, "U")) == len(stored(model, "V")) == 2
    filled = layers(model)["encoder.layer.0.intermediate.dense"]
    group = filled.adapter(filled.active_adapters[0]).basis
    group.fill(torch.ones_like(group.U), torch.ones_like(group.V))
    other = layers(model)["encoder.layer.2.intermediate.dense"]
    assert (other.adapter(other.active_adapters[0]).basis.U == 1).all()
