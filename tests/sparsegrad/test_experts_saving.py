"""Adapters on experts are merged, saved, loaded and copied exactly, as with LoRA."""

import copy

import pytest
import torch
from expert_tools import MODELS, adapted, expert_layers
from mixtures import EXPERTS, ids, mixtral, train
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import load_peft_weights, set_peft_model_state_dict

from peft_sparsegrad import SparseGradConfig, save_transition_matrices, warmup
from peft_sparsegrad.cli.saved.adapter import SavedAdapter
from peft_sparsegrad.cli.saved.method import WeightLayout
from peft_sparsegrad.cli.saved.sparsegrad import SavedSparseGrad
from peft_sparsegrad.sparsegrad.layer import layer_adapters


@pytest.mark.parametrize("make", MODELS)
def test_merging_saving_and_loading_are_exact_as_with_lora(make, tmp_path):
    lora = LoraConfig(target_modules=[], target_parameters=EXPERTS, r=2)
    for name, model in (("ours", adapted(make(), warmup_steps=2)), ("lora", get_peft_model(make(), lora))):
        losses = train(model, steps=5)
        assert losses[-1] < losses[0]
        model.eval()
        with torch.no_grad():
            output = model(input_ids=ids()).logits
            with model.disable_adapter():
                assert torch.equal(model(input_ids=ids()).logits, make().eval()(input_ids=ids()).logits)
            model.save_pretrained(tmp_path / name)
            loaded = PeftModel.from_pretrained(make(), tmp_path / name).eval()
            assert torch.equal(loaded(input_ids=ids()).logits, output)
            model.merge_adapter(safe_merge=True)
            torch.testing.assert_close(model(input_ids=ids()).logits, output)
            model.unmerge_adapter()
            torch.testing.assert_close(model(input_ids=ids()).logits, output)
            merged = model.merge_and_unload()
            torch.testing.assert_close(merged(input_ids=ids()).logits, output)
            assert merged.state_dict().keys() == make().state_dict().keys()


def test_file_has_the_parameters_names(tmp_path):
    adapted(mixtral()).save_pretrained(tmp_path)
    names = {name.partition(".sparsegrad_")[0] for name in load_peft_weights(str(tmp_path))}
    assert names == {f"base_model.model.model.layers.{block}.{name}" for block in range(2) for name in EXPERTS}


def test_transition_matrices_give_bases_and_supports_again(tmp_path):
    first = adapted(mixtral(), warmup_steps=2)
    warmup(first, [{"input_ids": ids(), "labels": ids()}] * 2, progress=False)
    save_transition_matrices(first, tmp_path / "bases.safetensors")
    second = adapted(mixtral(), transition_matrices=str(tmp_path / "bases.safetensors"))
    for one, other in zip(layer_adapters(first, "default"), layer_adapters(second, "default"), strict=True):
        assert torch.equal(one.indices, other.indices)


def test_saved_experts_are_read_by_the_command_line(tmp_path):
    model = adapted(mixtral(), init_weights=False, rank=(10, 8))
    model.save_pretrained(tmp_path)
    saved = SavedSparseGrad(SavedAdapter(tmp_path))
    ks = {adapter.plan.name: adapter.plan.k for adapter in layer_adapters(model, "default")}
    assert {layer.module: layer.values for layer in saved.facts()["layers"]} == ks
    for layer in expert_layers(model):
        name, wanted = layer.adapter("default").plan.name, layer.get_delta_weight("default")
        torch.testing.assert_close(saved.delta(name, WeightLayout(saved.modules[name])), wanted.flatten(0, 1))


def test_adapter_of_other_experts_is_refused_and_nothing_changes(tmp_path):
    trained = adapted(mixtral(num_local_experts=3), init_weights=False)
    trained.save_pretrained(tmp_path)
    model = adapted(mixtral())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"weight_shape.*is for a weight of \(3, 48, 16\), not \(4, 48, 16\)"):
        set_peft_model_state_dict(model, load_peft_weights(str(tmp_path)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_several_adapters_on_the_same_and_on_other_parameters():
    model = adapted(mixtral(), init_weights=False)
    first = model(input_ids=ids()).logits
    settings = {"density": 0.1, "warmup_steps": 0, "init_weights": False}
    second = SparseGradConfig(target_modules=["v_proj"], target_parameters=[EXPERTS[0], "gate.weight"], **settings)
    model.add_adapter("second", second)
    torch.testing.assert_close(model(input_ids=ids()).logits, first)
    model.set_adapter("second")
    alone = model(input_ids=ids()).logits
    assert not torch.allclose(alone, first)
    losses = train(model)
    assert losses[-1] < losses[0]
    copied = copy.deepcopy(model)
    assert torch.equal(copied(input_ids=ids()).logits, model(input_ids=ids()).logits)
    assert copied.base_model.model.model.layers[0].mlp.experts.gate_up_proj.base_layer is not (
        model.base_model.model.model.layers[0].mlp.experts.base_layer
    )
    model.delete_adapter("second")
    model.set_adapter("default")
    torch.testing.assert_close(model(input_ids=ids()).logits, first)
