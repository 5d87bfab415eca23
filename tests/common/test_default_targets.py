"""What both methods say where their default targets are not the whole story: other towers, experts, no default."""

from __future__ import annotations

import ast
import re
import warnings

import pytest
from architectures import model_class, small_config, tiny_model
from mixtures import mixtral, qwen3_moe
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import CLIPModel

from peft_sparsegrad import GradDropConfig, SparseGradConfig

CONFIGS = [SparseGradConfig, GradDropConfig]


class Unknown(nn.Module):
    """Two blocks whose MLP has a name that an embedding has too."""

    def __init__(self):
        super().__init__()
        block = {"norm": nn.LayerNorm(8), "mix": nn.Linear(8, 8)}
        mlp = [nn.ModuleDict({"a": nn.Linear(8, 24), "b": nn.Linear(24, 8)}) for _ in range(2)]
        self.blocks = nn.ModuleList([nn.ModuleDict({**block, "mlp": each}) for each in mlp])
        self.a = nn.Embedding(4, 8)


class Numbered(nn.Module):
    """Two blocks whose MLP is a sequence, so that its layers have numbers for names."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"norm": nn.LayerNorm(8), "ffn": mlp()}) for _ in range(2))


class Nested(nn.Module):
    """A layer whose whole name ends that of a module that is not linear."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(8, 16), nn.ModuleDict({"fc": nn.ReLU()})


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))


def proposal_of(base: nn.Module, config: type) -> tuple[str, str | list[str]]:
    """Return the error for a model without default targets, and the targets that it proposes."""
    with pytest.raises(ValueError, match="Please specify `target_modules`") as error:
        get_peft_model(base, config())
    return str(error.value), ast.literal_eval(re.search(r"target_modules=(.*)\.$", str(error.value))[1])


UNKNOWN = [
    (
        Unknown,
        "blocks.*.mlp.a (2 of 8 to 24), blocks.*.mlp.b (2 of 24 to 8)",
        {f"blocks.{i}.mlp.{name}" for i in (0, 1) for name in "ab"},
    ),
    (
        Numbered,
        "blocks.*.ffn.* (2 of 8 to 32), blocks.*.ffn.* (2 of 32 to 8)",
        {f"blocks.{i}.ffn.{j}" for i in (0, 1) for j in (0, 2)},
    ),
    (mlp, "* (1 of 8 to 32), * (1 of 32 to 8)", {"0", "2"}),
    (lambda: nn.Sequential(mlp(), mlp()), "*.* (2 of 8 to 32)", {"0.0", "0.2", "1.0", "1.2"}),
    (Nested, "fc (1 of 8 to 16)", {"fc"}),
]


@pytest.mark.parametrize(("make", "roles", "layers"), UNKNOWN)
def test_error_for_an_unknown_model_lists_its_layers_by_role_and_its_proposal_works(make, roles, layers):
    message, proposal = proposal_of(make(), SparseGradConfig)
    assert roles in message
    model = get_peft_model(make(), SparseGradConfig(warmup_steps=0, target_modules=proposal))
    assert set(model.targeted_module_names) == layers


def test_proposal_has_names_before_numbers_where_there_are_any():
    assert proposal_of(Numbered(), SparseGradConfig)[1] == ["ffn.0", "ffn.2"]
    assert proposal_of(mlp(), SparseGradConfig)[1] == ["0", "2"]


@pytest.mark.parametrize(("make", "roles", "layers"), UNKNOWN[2:])
def test_graddrop_s_error_for_a_model_without_blocks_proposes_targets_that_work(make, roles, layers):
    message, proposal = proposal_of(make(), GradDropConfig)
    assert roles in message
    model = get_peft_model(make(), GradDropConfig(target_modules=proposal))
    assert set(model.targeted_module_names) == layers


def test_default_of_a_mixture_without_other_mlp_layers_is_its_experts():
    model = get_peft_model(tiny_model("mixtral"), SparseGradConfig())
    config = model.peft_config["default"]
    assert config.target_modules == set()
    assert config.target_parameters == ["experts.down_proj", "experts.gate_up_proj"]
    names = {
        name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "sparsegrad_adapter")
    }
    assert names == {"down_proj", "gate_up_proj"}


def with_linear(model: nn.Module, parent: str, name: str) -> nn.Module:
    """A model with one more layer inside each of these modules."""
    for layer in model.model.layers:
        layer.get_submodule(parent).add_module(name, nn.Linear(16, 8))
    return model


def mixture_with_a_dense_layer(tower: bool) -> nn.Module:
    """A mixture of a type without MLP modules among its default targets, whose first block has no experts."""
    if not tower:
        return qwen3_moe(mlp_only_layers=[0])
    config = small_config("qwen3_vl_moe")
    config.text_config.mlp_only_layers = [0]
    return model_class("qwen3_vl_moe")(config)


@pytest.mark.parametrize(("tower", "start"), [(False, "model.layers."), (True, "model.language_model.layers.")])
def test_dense_layers_beside_experts_are_named_and_the_setting_for_both_works(tower, start):
    base = mixture_with_a_dense_layer(tower)
    inside = {name: p.numel() for name, p in base.named_parameters() if name.startswith(start)}
    share = sum(size for name, size in inside.items() if re.search(r"0\.mlp\.\w+_proj", name)) / sum(inside.values())
    message = (
        rf"{re.escape(start)}\*.mlp.up_proj \(1 of \d+ to \d+\).* hold {share:.1%} of the parameters of the blocks "
        r"and stay frozen. To train both, set target_modules=(.*) and target_parameters=(\[.*\]); target_modules=\[\]"
    )
    with pytest.warns(UserWarning, match=message) as said:
        model = get_peft_model(base, SparseGradConfig())
    experts = {f"{start}1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}
    assert {*model.targeted_module_names, *model.targeted_parameter_names} == experts
    both = next(found for each in said if (found := re.search(message, str(each.message))))
    modules, parameters = map(ast.literal_eval, both.groups())
    model = get_peft_model(
        mixture_with_a_dense_layer(tower), SparseGradConfig(target_modules=modules, target_parameters=parameters)
    )
    assert set(model.targeted_parameter_names) == experts
    dense = {f"{start}0.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
    assert set(model.targeted_module_names) == dense


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (mixtral, {}),
        (qwen3_moe, {}),
        (lambda: with_linear(qwen3_moe(), "self_attn", "gate_proj"), {}),
        (lambda: with_linear(qwen3_moe(), "mlp.gate", "down_proj"), {}),
        (lambda: qwen3_moe(mlp_only_layers=[0]), {"target_modules": []}),
    ],
)
def test_experts_without_dense_layers_or_named_alone_are_no_reason_to_warn(make, settings):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the fused experts alone")
        get_peft_model(make(), SparseGradConfig(**settings, target_parameters=["experts.down_proj"]))


@pytest.mark.parametrize("config", CONFIGS)
def test_default_of_a_mixture_says_which_share_stays_frozen(config):
    base = tiny_model("deepseek_v3")
    inside = {name: p.numel() for name, p in base.named_parameters() if ".layers." in name}
    share = sum(size for name, size in inside.items() if ".experts." in name) / sum(inside.values())
    with pytest.warns(UserWarning, match=rf"{share:.1%} of the parameters of the blocks.*target_parameters=") as said:
        get_peft_model(base, config())
    assert sum("fused experts" in str(each.message) for each in said) == 1


def test_names_that_experts_have_too_are_said_to_mean_only_the_modules():
    with pytest.warns(UserWarning, match="leaves out the fused experts"):
        get_peft_model(tiny_model("deepseek_v3"), SparseGradConfig(target_modules=["up_proj", "down_proj"]))


@pytest.mark.parametrize("config", CONFIGS)
def test_experts_left_out_are_not_said_of_a_loaded_adapter_or_to_those_who_name_parameters(config, tmp_path):
    get_peft_model(tiny_model("deepseek_v3"), config()).save_pretrained(tmp_path)
    settings = config(target_parameters=["experts.down_proj"])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fused experts")
        PeftModel.from_pretrained(tiny_model("deepseek_v3"), tmp_path)
        get_peft_model(tiny_model("deepseek_v3"), settings)


def test_targets_that_no_expert_is_named_like_are_the_users_own_choice():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fused experts")
        get_peft_model(tiny_model("mixtral"), SparseGradConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("exclude", [None, ["layers.0.mlp.up_proj"], r".*layers\.0\.mlp\.up_proj"])
def test_default_of_a_model_for_images_and_text_lies_in_its_language_tower(config, exclude, tmp_path):
    with pytest.warns(UserWarning, match="lie in the language tower, 'model.language_model'") as said:
        model = get_peft_model(tiny_model("llava"), config(exclude_modules=exclude))
    assert sum("language tower" in str(each.message) for each in said) == 1
    names = model.targeted_module_names
    assert names
    assert all(name.startswith("model.language_model.layers.") for name in names)
    assert ("model.language_model.layers.0.mlp.up_proj" in names) == (exclude is None)
    if config is SparseGradConfig:
        assert {name.rpartition(".")[2] for name in names} == {"up_proj", "down_proj"}
    model.save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(tiny_model("llava"), tmp_path).targeted_module_names == names


@pytest.mark.parametrize("config", CONFIGS)
def test_default_of_two_towers_that_are_compared_has_both(config):
    names = get_peft_model(CLIPModel(small_config("clip")), config()).targeted_module_names
    assert {name.partition(".")[0] for name in names} == {"text_model", "vision_model"}
