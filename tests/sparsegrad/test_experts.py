"""SparseGrad on the fused weights of experts (`target_parameters`), with LoRA on the same parameters beside it."""

import copy
import logging

import pytest
import torch
from mixtures import EXPERTS, gpt_oss, ids, loss, mixtral, qwen3_moe, train
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch.func import functional_call
from versions import needs_grouped_mm

from peft_sparsegrad import (
    SparseGradConfig,
    convert_to_lora,
    create_sparsegrad_optimizer,
    rescale_adapter_scale,
    save_transition_matrices,
    warmup,
)
from peft_sparsegrad.cli.saved.adapter import SavedAdapter
from peft_sparsegrad.cli.saved.method import WeightLayout
from peft_sparsegrad.cli.saved.sparsegrad import SavedSparseGrad
from peft_sparsegrad.sparsegrad.layer import SparseGradLayer, layer_adapters

MODELS = [mixtral, qwen3_moe, gpt_oss]
IMPLEMENTATIONS = ["eager", "batched_mm", pytest.param("grouped_mm", marks=needs_grouped_mm)]


def adapted(model, adapter_name="default", **settings):
    size = {} if "num_values" in settings else {"density": 0.05}
    settings = {"target_modules": [], "target_parameters": EXPERTS, **size, "warmup_steps": 0, **settings}
    return get_peft_model(model, SparseGradConfig(task_type="CAUSAL_LM", **settings), adapter_name)


def expert_layers(model):
    return [module for module in model.modules() if isinstance(module, SparseGradLayer)]


def slow_weights(model, base, values):
    """Every adapted weight of `base` with its delta, expert by expert and with plain products, by name."""
    weights = dict(base.named_parameters())
    found = {}
    for layer, own_values in zip(expert_layers(model), values, strict=True):
        adapter = layer.adapter("default")
        weight, plan = weights[adapter.plan.name], adapter.plan
        S = weight.new_zeros(plan.num_entries).index_put((adapter.indices,), own_values).view(plan.core_shape)
        U = torch.eye(weight.shape[2]).to(weight) if adapter.basis.U is None else adapter.basis.U.to(weight)
        V = torch.eye(weight.shape[1]).to(weight) if adapter.basis.V is None else adapter.basis.V.to(weight)
        delta = torch.stack([V @ part @ U.T for part in S.chunk(len(weight))])
        found[plan.name] = (weight + delta).detach() if not own_values.requires_grad else weight + delta
    return found


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("make", MODELS)
def test_output_and_gradient_are_those_of_the_changed_weights(make, implementation):
    dtype = torch.float32 if implementation == "grouped_mm" else torch.float64  # which is all that it knows
    model = adapted(make(implementation).to(dtype), init_weights=False, rank=(10, 8)).to(dtype)
    base = make("eager").to(dtype)
    values = [layer.adapter("default").values.detach().clone().requires_grad_() for layer in expert_layers(model)]
    output = functional_call(base, slow_weights(model, base, values), kwargs={"input_ids": ids(), "labels": ids()})
    output.loss.backward()
    found = model(input_ids=ids(), labels=ids())
    found.loss.backward()
    torch.testing.assert_close(found.logits, output.logits)
    for layer, own in zip(expert_layers(model), values, strict=True):
        torch.testing.assert_close(layer.adapter("default").values.grad, own.grad)


def test_training_is_that_of_the_changed_weights():
    model = adapted(mixtral().double(), init_weights=False, renewal_steps=0).double()
    base = mixtral().double()
    values = [layer.adapter("default").values.detach().clone().requires_grad_() for layer in expert_layers(model)]
    optimizer = torch.optim.AdamW(values, lr=0.02)
    for _ in range(3):
        weights = slow_weights(model, base, values)
        functional_call(base, weights, kwargs={"input_ids": ids(), "labels": ids()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    train(model, steps=3)
    for layer, own in zip(expert_layers(model), values, strict=True):
        torch.testing.assert_close(layer.adapter("default").values, own)


def weight_gradients(base):
    base.requires_grad_(True)
    loss(base).backward()
    return {name: parameter.grad for name, parameter in base.named_parameters() if name.endswith(tuple(EXPERTS))}


def test_warm_up_finds_the_basis_of_all_experts_and_a_support_for_each():
    model = adapted(mixtral().double(), rank=(7, 6), density=0.02, warmup_steps=2)
    warmup(model, [{"input_ids": ids(), "labels": ids()}] * 2, progress=False)
    gradients = weight_gradients(mixtral().double())
    for ending in EXPERTS:
        own = {name: gradient for name, gradient in gradients.items() if name.endswith(ending)}
        stack = torch.cat(list(own.values()))
        V = torch.linalg.eigh((stack @ stack.mT).sum(0)).eigenvectors.flip(1)[:, :7]
        U = torch.linalg.eigh((stack.mT @ stack).sum(0)).eigenvectors.flip(1)[:, :6]
        adapters = [each for each in layer_adapters(model, "default") if each.plan.name in own]
        assert len({each.basis for each in adapters}) == 1
        for mine, wanted in ((adapters[0].basis.V.double(), V), (adapters[0].basis.U.double(), U)):
            torch.testing.assert_close(mine @ mine.T, wanted @ wanted.T, atol=1e-3, rtol=0)  # rounded to float16
        for adapter in adapters:
            basis, k = adapter.basis, adapter.plan.k_of_expert
            for expert, gradient in enumerate(own[adapter.plan.name]):
                core = (basis.V.double().T @ gradient @ basis.U.double()).abs().flatten()
                support = adapter.indices.view(-1, k)[expert] - expert * core.numel()
                assert set(support.tolist()) == set(core.topk(k).indices.tolist())


def without_tokens_at(model, expert):
    """Keep every token away from an expert of the first layer."""
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight[expert] = 0
    router = model.model.layers[0].mlp.gate
    forward = router.forward

    def routed(x):
        logits, scores, chosen = forward(x)
        return logits, scores, torch.where(chosen == expert, (chosen + 1) % 4, chosen)

    router.forward = routed
    return model


def test_expert_without_a_token_gets_the_support_of_the_others_and_is_named(caplog):
    model = adapted(without_tokens_at(mixtral(), 2), warmup_steps=2)
    with caplog.at_level(logging.WARNING, "peft_sparsegrad"):
        warmup(model, [{"input_ids": ids(), "labels": ids()}] * 2, progress=False)
    named = [record.getMessage() for record in caplog.records if "no token" in record.getMessage()]
    assert [message.count("1 of the 4 experts of 'model.layers.0.mlp.experts.") for message in named] == [1, 1]
    gradients = weight_gradients(without_tokens_at(mixtral(), 2))
    for adapter in layer_adapters(model, "default")[:2]:
        gradient, basis = gradients[adapter.plan.name], adapter.basis
        assert not gradient[2].any()
        core = gradient if basis.V is None else basis.V.T @ gradient
        core = (core if basis.U is None else core @ basis.U).abs()
        k, size = adapter.plan.k_of_expert, core[0].numel()
        support = adapter.indices.view(4, k)[2] - 2 * size
        assert set(support.tolist()) == set(core.sum(0).flatten().topk(k).indices.tolist())


def test_renewals_keep_each_experts_number_and_leave_an_idle_one_alone():
    model = adapted(without_tokens_at(mixtral(), 2), renewal_steps=2)
    before = [adapter.indices.clone() for adapter in layer_adapters(model, "default")]
    train(model, steps=3)
    for adapter, old in zip(layer_adapters(model, "default"), before, strict=True):
        size, k = adapter.plan.num_entries // 4, adapter.plan.k_of_expert
        assert ((adapter.indices // size).bincount(minlength=4) == k).all()
        assert not torch.equal(adapter.indices, old)
    for adapter, old in list(zip(layer_adapters(model, "default"), before, strict=True))[:2]:
        assert torch.equal(adapter.indices.view(4, -1)[2], old.view(4, -1)[2])


@pytest.mark.parametrize(
    "settings", [{"rank": "full"}, {"support": "dynamic"}, {"basis": "svd", "num_values": 5}, {"basis": "identity"}]
)
def test_kinds_of_support_and_basis_train(settings):
    model = adapted(mixtral(), warmup_steps=2, renewal_steps=2, **settings)
    optimizer = create_sparsegrad_optimizer(model, 0.02)
    losses = []
    for _ in range(6):
        losses.append(loss(model))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    k = 5 if "num_values" in settings else round(0.05 * 16 * 24)
    assert layer_adapters(model, "default")[-1].plan.k == 4 * k


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
    assert train(model)[-1] < loss(mixtral()).item() + 1
    copied = copy.deepcopy(model)
    assert torch.equal(copied(input_ids=ids()).logits, model(input_ids=ids()).logits)
    assert copied.base_model.model.model.layers[0].mlp.experts.gate_up_proj.base_layer is not (
        model.base_model.model.model.layers[0].mlp.experts.base_layer
    )
    model.delete_adapter("second")
    model.set_adapter("default")
    torch.testing.assert_close(model(input_ids=ids()).logits, first)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_warms_up_and_trains_the_same(use_reentrant):
    plain, checkpointed = adapted(mixtral(), warmup_steps=2), adapted(mixtral(), warmup_steps=2)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    checkpointed.enable_input_require_grads()
    checkpointed.train()
    plain.train()
    assert train(plain, steps=5) == pytest.approx(train(checkpointed, steps=5), rel=1e-6)


@needs_grouped_mm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_bf16_train(dtype):
    model = adapted(mixtral("grouped_mm").to(dtype), warmup_steps=2)
    with torch.autocast("cpu", torch.bfloat16):
        losses = train(model, steps=5)
    assert losses[-1] < losses[2]
    assert layer_adapters(model, "default")[0].values.dtype == torch.float32


def test_default_targets_come_with_the_parameters_as_with_lora():
    """Without `target_modules`, a model type without a default gets the parameters alone."""
    model = adapted(mixtral(), target_modules=None)
    names = {adapter.plan.name.split(".", 3)[-1] for adapter in layer_adapters(model, "default")}
    assert set(EXPERTS) <= names


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


def test_layers_to_transform_holds_for_parameters():
    model = adapted(mixtral(), layers_to_transform=[1])
    assert {adapter.plan.name.split(".")[2] for adapter in layer_adapters(model, "default")} == {"1"}


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


def test_scale_multiplies_the_delta_as_with_lora():
    model = adapted(mixtral(), init_weights=False)
    with torch.no_grad(), rescale_adapter_scale(model, 0.5):
        halved = model(input_ids=ids()).logits
        model.merge_adapter()
        torch.testing.assert_close(model(input_ids=ids()).logits, halved)
        model.unmerge_adapter()
    for adapter in layer_adapters(model, "default"):
        adapter.values.data /= 2
    torch.testing.assert_close(model(input_ids=ids()).logits, halved)


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
