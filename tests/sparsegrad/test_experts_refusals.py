"""What cannot be done with experts is refused, as with LoRA, and nothing changes."""

import pytest
import torch
from expert_tools import adapted
from mixtures import EXPERTS, ids, mixtral
from peft import LoraConfig, get_peft_model

from peft_sparsegrad import SparseGradConfig, convert_to_lora


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (["mlp.experts.gate_upproj"], {}, r"no parameter of the model: similar ones are 'mlp.experts.gate_up_proj'"),
        ([EXPERTS[0], "nothing"], {}, r"names 'nothing', which is no parameter"),
        (["input_layernorm.weight"], {}, r"of the shape \(16,\): adapters are for weights"),
        (["q_proj.weight"], {"target_modules": ["q_proj"]}, r"`target_modules` names .*q_proj'.*leave one"),
        (EXPERTS, {"layers_to_transform": [7]}, r"leaves no parameter"),
        (EXPERTS, {"num_values": 10**6}, r"experts.*1000000 values do not fit"),
    ],
)
def test_bad_names_are_refused_before_anything_changes(names, settings, message):
    base = mixtral()
    keys = list(base.state_dict())
    with pytest.raises(ValueError, match=message):
        adapted(base, target_parameters=names, **settings)
    assert list(base.state_dict()) == keys


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantised_experts_are_refused(dtype):
    base = mixtral()
    experts = base.model.layers[1].mlp.experts
    experts.gate_up_proj = torch.nn.Parameter(experts.gate_up_proj.data.to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.gate_up_proj', which is quantised .*dequantised"):
        adapted(base)
    assert type(base.model.layers[0].mlp.experts).__name__ == "MixtralExperts"


def test_names_must_be_a_list():
    with pytest.raises(ValueError, match="`target_parameters` must be a list of names or None, not 'gate_up_proj'"):
        SparseGradConfig(target_parameters="gate_up_proj")


def test_conversion_to_lora_is_refused():
    message = r"cannot hold the changes of 4 weights of experts .*, the first is .*experts.gate_up_proj.*`linear_only="
    trained = adapted(mixtral(), target_modules=["q_proj"], init_weights=False)
    with pytest.raises(ValueError, match=message):
        convert_to_lora(trained)
    lost = {name for name, error in convert_to_lora(trained, linear_only=True).errors.items() if error == 1}
    assert lost == {f"model.layers.{block}.{name}" for block in (0, 1) for name in EXPERTS}


@pytest.mark.parametrize("init_weights", [True, False])
@pytest.mark.parametrize("linear_only", [True, False])
def test_conversion_of_experts_alone_is_refused_with_a_way_out_that_works(linear_only, init_weights):
    model = adapted(mixtral(), init_weights=init_weights)
    message = "on no linear layer, .* experts .*: merge the adapter with `model.merge_and_unload\\(\\)`$"
    with pytest.raises(ValueError, match=message):
        convert_to_lora(model, linear_only=linear_only)


@pytest.mark.parametrize("method", ["ours", "lora"])
def test_weighted_merges_are_refused_as_with_lora(method):
    lora = LoraConfig(target_modules=[], target_parameters=EXPERTS, r=2)
    model = adapted(mixtral()) if method == "ours" else get_peft_model(mixtral(), lora)
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=r"target_parameters|targeting nn.Parameter"):
        model.add_weighted_adapter(["default"], [1.0], "merged", combination_type="linear")
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("names", [EXPERTS, ["gate.weight"]])
def test_mixed_batches_are_refused_as_with_lora(names):
    model = adapted(mixtral(), target_parameters=names).eval()
    with pytest.raises(ValueError, match=r"`adapter_names` cannot be used with an adapter on 'model.*mlp"):
        model(input_ids=ids(), adapter_names=["default", "__base__"] * 2)
    lora = get_peft_model(mixtral(), LoraConfig(target_modules=[], target_parameters=names, r=2)).eval()
    with pytest.raises(ValueError, match="does not support mixed adapter batches"):
        lora(input_ids=ids(), adapter_names=["default", "__base__"] * 2)


def test_weighted_sums_are_refused_as_with_lora():
    model = adapted(mixtral(), target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"`adapters`: 'default' has `target_parameters=.*no weighted sum"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    assert list(model.peft_config) == ["default"]
    lora = get_peft_model(mixtral(), LoraConfig(target_modules=[], target_parameters=EXPERTS, r=2))
    with pytest.raises(ValueError, match="does not support targeting"):
        lora.add_weighted_adapter(["default"], [1.0], "sum")
