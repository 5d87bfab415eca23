"""Names of modules that the model does not have; LoRA says nothing where another name matches."""

import re
import warnings

import pytest
from mixtures import gpt_oss, mixtral, qwen3_moe
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import NoMatchingPeftModuleError
from tiny import bert, llama
from torch import nn

from peft_sparsegrad import GradDropConfig, SparseGradConfig

BOTH = (SparseGradConfig, GradDropConfig)


@pytest.mark.parametrize("config", BOTH)
@pytest.mark.parametrize(
    ("names", "hint"),
    [
        (["up_prj"], "Similar names in the model are 'up_proj'"),
        (["mlp.up_prj"], "'mlp.up_proj'"),
        (["zzz"], "linear layers end in 'down_proj', 'gate_proj'"),
        (".*zzz", "linear layers end in 'down_proj', 'gate_proj'"),
    ],
)
def test_peft_s_error_has_names_of_the_model(config, names, hint):
    base = llama()
    keys = list(base.state_dict())
    with pytest.raises(NoMatchingPeftModuleError) as lora:
        get_peft_model(llama(), LoraConfig(target_modules=names))
    with pytest.raises(NoMatchingPeftModuleError) as ours:
        get_peft_model(base, config(target_modules=names))
    assert str(ours.value).startswith(str(lora.value))
    assert hint in str(ours.value)
    assert list(base.state_dict()) == keys


def test_layers_whose_names_are_numbers_have_names_that_match():
    base = nn.ModuleDict({"ffn": nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)), "0": nn.ReLU()})
    with pytest.raises(NoMatchingPeftModuleError, match=r"linear layers end in 'ffn\.0', 'ffn\.2'\.$"):
        get_peft_model(base, SparseGradConfig(target_modules=["zzz"]))


@pytest.mark.parametrize("config", BOTH)
@pytest.mark.parametrize("make", [mixtral, qwen3_moe, gpt_oss])
@pytest.mark.parametrize(
    ("names", "modules", "parameters"),
    [
        (["up_proj", "down_proj"], [], ["experts.down_proj", "experts.gate_up_proj"]),
        (["mlp.gate_proj"], [], ["experts.gate_up_proj"]),
        (["experts.0.w1"], [], ["experts.down_proj", "experts.gate_up_proj"]),
        (r".*\.experts\.\w+_proj", [], ["experts.down_proj", "experts.gate_up_proj"]),
        (["q_proj", "down_proj"], ["q_proj"], ["experts.down_proj"]),
    ],
)
def test_names_of_fused_experts_are_said_to_be_parameters_and_the_setting_works(
    config, make, names, modules, parameters
):
    setting = re.escape(f"target_modules={modules} and target_parameters={parameters}.")
    message = f"experts are parameters and no modules: to train them, set {setting}$"
    expected = pytest.warns(UserWarning, match=message) if modules else pytest.raises(ValueError, match=message)
    with expected:
        get_peft_model(make(), config(target_modules=names))
    model = get_peft_model(make(), config(target_modules=modules, target_parameters=parameters))
    adapted = {
        ".".join(name.split(".")[-2:]) for name in (*model.targeted_module_names, *model.targeted_parameter_names)
    }
    assert adapted == {*parameters, *(f"self_attn.{name}" for name in modules)}


def test_experts_are_added_to_those_that_are_named_and_other_wrong_names_get_similar_ones():
    config = SparseGradConfig(
        target_modules=["q_proj", "down_proj", "v_prj"], target_parameters=["experts.gate_up_proj"]
    )
    message = r"target_parameters=\['experts.down_proj', 'experts.gate_up_proj'\]. Similar names .* 'v_proj'"
    with pytest.warns(UserWarning, match=message):
        get_peft_model(mixtral(), config)


@pytest.mark.parametrize("where", [{"layers_to_transform": [7]}, {"layers_to_transform": 0, "layers_pattern": "h"}])
def test_names_that_are_right_are_not_blamed_for_blocks_that_are_left_out(where):
    with pytest.raises(NoMatchingPeftModuleError, match="The names are right, but `layers_to_transform=") as error:
        get_peft_model(llama(), SparseGradConfig(target_modules=["up_proj"], **where))
    assert "Similar names" not in str(error.value)


@pytest.mark.parametrize("config", BOTH)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["up_proj", "down_prj"]}, "`target_modules` names 'down_prj', .*'down_proj'"),
        ({"modules_to_save": ["lm_haed"]}, "`modules_to_save` names 'lm_haed', .*'lm_head'"),
    ],
)
def test_one_wrong_name_among_right_ones_is_said(config, settings, message):
    with pytest.warns(UserWarning, match=message):
        get_peft_model(llama(), config(**{"target_modules": ["up_proj"], **settings}))


@pytest.mark.parametrize("config", BOTH)
def test_right_names_and_a_loaded_adapter_are_silent(config, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the model does not have")
        get_peft_model(bert(), config(task_type="SEQ_CLS"))  # PEFT adds `score` to `modules_to_save`
        model = get_peft_model(
            llama(), config(target_modules=["mlp.up_proj", "down_proj"], modules_to_save=["lm_head"])
        )
        model.save_pretrained(tmp_path)
        PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
