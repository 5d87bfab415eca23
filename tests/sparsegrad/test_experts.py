"""SparseGrad on the fused weights of experts (`target_parameters`): what it computes and trains."""

import pytest
import torch
from expert_tools import MODELS, adapted, expert_layers
from mixtures import EXPERTS, ids, loss, mixtral, train
from torch.func import functional_call
from versions import needs_grouped_mm

from peft_sparsegrad import create_sparsegrad_optimizer, rescale_adapter_scale
from peft_sparsegrad.sparsegrad.layer import layer_adapters

IMPLEMENTATIONS = ["eager", "batched_mm", pytest.param("grouped_mm", marks=needs_grouped_mm)]


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


def test_layers_to_transform_holds_for_parameters():
    model = adapted(mixtral(), layers_to_transform=[1])
    assert {adapter.plan.name.split(".")[2] for adapter in layer_adapters(model, "default")} == {"1"}


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
