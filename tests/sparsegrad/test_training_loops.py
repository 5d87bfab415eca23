"""Loops that are not ours: only the gradients of steps that were taken count, and a warm-up ends between steps."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import adapted, batch, llama, logits, train_with_an_optimizer_each
from transformers import AlbertConfig, AlbertForSequenceClassification

from peft_sparsegrad import SparseGradConfig, warmup
from peft_sparsegrad.sparsegrad.layer import layer_adapters


def trained(model) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def sgd(model, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(trained(model), lr=lr)


def supports(model) -> list[list[int]]:
    return [sorted(adapter.indices.tolist()) for adapter in layer_adapters(model, "default")]


def sums(model) -> list[torch.Tensor | None]:
    return [adapter.gradient_sum for adapter in layer_adapters(model, "default")]


def backward(model, number: int, factor: float = 1.0) -> None:
    (model(**batch(number)).loss * factor).backward()


# Passes that no step is taken with -----------------------------------------------------------------------------------


def nothing(model, optimizer) -> None:
    pass


def batch_of_nan(model, optimizer) -> None:
    """A loop that skips a step whose gradient has NaN."""
    backward(model, 7, float("nan"))
    assert not torch.isfinite(torch.nn.utils.clip_grad_norm_(trained(model), 1.0))
    optimizer.zero_grad()


def batch_of_inf_set_to_zero(model, optimizer) -> None:
    """The same, with a gradient that is set to zero in place."""
    backward(model, 7, float("inf"))
    optimizer.zero_grad(set_to_none=False)


def discarded(model, optimizer) -> None:
    """A pass for the norm of its gradient."""
    backward(model, 7, 100.0)
    for parameter in trained(model):
        parameter.grad = None


def discarded_twice_in_place(model, optimizer) -> None:
    for _ in range(2):
        backward(model, 7, 100.0)
        optimizer.zero_grad(set_to_none=False)


def saliency(model, optimizer) -> None:
    """A gradient of the input alone."""
    embedded = model.get_input_embeddings()(batch(7)["input_ids"]).detach().requires_grad_()
    loss = model(inputs_embeds=embedded, labels=batch(7)["labels"]).loss * 100
    assert torch.autograd.grad(loss, embedded)[0].any()


def failed(model, optimizer) -> None:
    """A backward pass that dies in its middle, and is discarded."""
    up = model.get_base_model().model.layers[0].mlp.up_proj
    handle = up.register_full_backward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        backward(model, 7, 100.0)
    handle.remove()
    optimizer.zero_grad()


INTERLUDES = [batch_of_nan, batch_of_inf_set_to_zero, discarded, discarded_twice_in_place, saliency, failed]


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("interlude", INTERLUDES)
def test_pass_without_a_step_leaves_no_trace(interlude, micro_batches):
    models = []
    for between in (nothing, interlude):
        model = adapted(renewal_steps=4).train()
        optimizer = sgd(model)
        for number in range(4):
            between(model, optimizer)
            for micro in range(micro_batches):
                backward(model, number + micro)
            optimizer.step()
            optimizer.zero_grad(set_to_none=number % 2 == 0)
            if number == 2:
                models.append((model, copy.deepcopy(sums(model))))
    (plain, plain_sums), (model, model_sums) = models
    for ours, theirs in zip(model_sums, plain_sums, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.any()
    assert supports(model) == supports(plain) != supports(adapted())


def test_saliency_between_micro_batches_leaves_no_trace():
    found = []
    for between in (nothing, saliency):
        model = adapted(renewal_steps=4).train()
        optimizer = sgd(model)
        backward(model, 0)
        between(model, optimizer)
        backward(model, 1)
        optimizer.step()
        found.append(sums(model))
    assert all(map(torch.equal, *found))


def test_clipping_between_micro_batches_loses_none():
    """Something else has written to the gradient, and it was not set to zero."""
    model, expected = adapted(renewal_steps=4).train(), adapted(renewal_steps=4).train()
    for made, clips in ((model, True), (expected, False)):
        optimizer = sgd(made)
        backward(made, 0)
        if clips:
            torch.nn.utils.clip_grad_norm_(trained(made), 1e-3)
        backward(made, 1)
        optimizer.step()
    for ours, theirs in zip(sums(model), sums(expected), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_several_steps_with_one_gradient_count_once():
    model = adapted(renewal_steps=9).train()
    optimizer = sgd(model)
    backward(model, 0)
    for _ in range(3):
        optimizer.step()
    assert {adapter.num_steps for adapter in layer_adapters(model, "default")} == {1}


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_optimizer_inside_the_backward_pass_is_the_one_after_it(checkpointing):
    losses, counted = [], []
    for inside in (False, True):
        model = adapted(renewal_steps=2).train()
        if checkpointing is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        losses.append(train_with_an_optimizer_each(model, 8, inside))
        counted.append({adapter.num_steps for adapter in layer_adapters(model, "default")})
    assert losses[0] == losses[1]
    assert counted == [{8}, {8}]


# Steps that cannot be seen -------------------------------------------------------------------------------------------


def step_on_copies(model, copies, optimizer) -> None:
    for parameter, own in zip(trained(model), copies, strict=True):
        own.grad = parameter.grad.clone()
    optimizer.step()
    with torch.no_grad():
        for parameter, own in zip(trained(model), copies, strict=True):
            parameter.data.copy_(own)  # as DeepSpeed does, without a trace in the parameter's version
            parameter.grad = None


@pytest.mark.parametrize("settings", [{"renewal_steps": 25}, {"support": "dynamic"}])
def test_optimizer_on_copies_is_refused_in_its_second_pass(settings):
    model = adapted(**settings).train()
    copies = [parameter.detach().clone() for parameter in trained(model)]
    optimizer = torch.optim.AdamW(copies, lr=0.01)
    backward(model, 0)
    step_on_copies(model, copies, optimizer)
    with pytest.raises(RuntimeError, match="changed without a step of an optimizer that holds them"):
        backward(model, 1)


def test_optimizer_on_copies_trains_a_support_that_stays():
    model, plain = adapted(renewal_steps=0).train(), adapted(renewal_steps=0).train()
    copies = [parameter.detach().clone() for parameter in trained(model)]
    on_copies, own = torch.optim.AdamW(copies, lr=0.01), torch.optim.AdamW(trained(plain), lr=0.01)
    for number in range(5):
        backward(model, number)
        step_on_copies(model, copies, on_copies)
        backward(plain, number)
        own.step()
        own.zero_grad()
    assert torch.equal(logits(model), logits(plain))


def test_gradient_that_no_backward_pass_has_made_is_refused():
    model = adapted(renewal_steps=5).train()
    optimizer = sgd(model)
    gradients = torch.autograd.grad(model(**batch(0)).loss, trained(model))
    for parameter, gradient in zip(trained(model), gradients, strict=True):
        parameter.grad = gradient
    with pytest.raises(RuntimeError, match=r"not made by `backward\(\)`.*`renewal_steps=0`"):
        optimizer.step()


def test_adapter_loaded_between_two_passes_is_no_step_on_a_copy(tmp_path):
    other = adapted(init_weights=False)
    other.save_pretrained(tmp_path)
    model = adapted(renewal_steps=5).train()
    backward(model, 0)
    model.load_adapter(str(tmp_path), "default", is_trainable=True)
    model.train()
    backward(model, 1)
    sgd(model).step()
    assert {adapter.num_steps for adapter in layer_adapters(model, "default")} == {1}


def test_adam_is_refused_for_a_dynamic_support():
    model = adapted(support="dynamic").train()
    optimizer = torch.optim.AdamW(trained(model), lr=0.01)
    backward(model, 0)
    optimizer.step()  # no entry has a momentum yet
    optimizer.zero_grad()
    backward(model, 1)
    with pytest.raises(RuntimeError, match=r"moved values of .* whose gradient is zero.*create_sparsegrad_optimizer"):
        optimizer.step()


def test_sgd_is_as_good_as_masked_for_a_dynamic_support():
    model = adapted(support="dynamic").train()
    optimizer = sgd(model)
    for number in range(5):
        backward(model, number)
        optimizer.step()
        optimizer.zero_grad()
    assert all(adapter.values.any() for adapter in layer_adapters(model, "default"))


# The warm-up that nobody called --------------------------------------------------------------------------------------


def three_passes(model, number: int) -> torch.Tensor:
    """A triplet loss: three forward passes and one backward pass."""
    return sum(model(**batch(3 * number + each)).loss for each in range(3))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_several_forward_passes_with_checkpointing_are_one_pass(use_reentrant):
    models = [adapted(warmup_steps=4).train() for _ in range(2)]
    models[1].enable_input_require_grads()
    models[1].gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for model in models:
        optimizer = sgd(model)
        settled = []
        for number in range(6):
            three_passes(model, number).backward()
            settled.append(all(adapter.is_settled for adapter in layer_adapters(model, "default")))
            optimizer.step()
            optimizer.zero_grad()
        assert settled == [False] * 4 + [True] * 2, "in the step after the fourth pass"
    assert supports(models[0]) == supports(models[1])


def test_layer_that_is_used_by_every_block_counts_once_a_pass():
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=64, embedding_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=6,
        num_attention_heads=2, num_labels=2,
    )  # fmt: skip
    settings = {"target_modules": ["ffn", "ffn_output"], "density": 0.05, "warmup_steps": 4, "task_type": "SEQ_CLS"}
    model = get_peft_model(AlbertForSequenceClassification(config), SparseGradConfig(**settings)).train()
    optimizer, settled = sgd(model), []
    for number in range(5):
        ids = batch(number)["input_ids"]
        model(input_ids=ids, labels=ids[:, 0] % 2).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        settled.append(all(adapter.is_settled for adapter in layer_adapters(model, "default")))
    assert settled == [False] * 3 + [True] * 2


def test_warm_up_ends_before_the_next_pass_where_no_step_is_seen():
    """Gradients that are looked at, and never stepped with."""
    model = adapted(warmup_steps=4).train()
    for number in range(4):
        backward(model, number)
    assert not any(adapter.is_settled for adapter in layer_adapters(model, "default"))
    backward(model, 4)
    assert all(adapter.is_settled for adapter in layer_adapters(model, "default"))


def test_passes_with_a_gradient_of_zero_do_not_count(caplog):
    """As in GRPO, while all answers have the same reward."""
    model, expected = adapted(warmup_steps=4).train(), adapted(warmup_steps=4).train()
    optimizer = sgd(model)
    for number in range(7):
        backward(model, number, factor=float(number >= 3))
        optimizer.step()
        optimizer.zero_grad()
        assert all(each.is_settled for each in layer_adapters(model, "default")) == (number == 6)
    assert "3 without a gradient passed over" in caplog.text
    for number in range(3, 7):
        backward(expected, number)
        sgd(expected).step()
    assert supports(model) == supports(expected)


def test_passes_with_nan_are_left_out_as_the_loop_leaves_them(caplog):
    model = adapted(warmup_steps=4).train()
    optimizer = sgd(model)
    for number in range(6):
        backward(model, number, factor=float("nan") if number in (1, 3) else 1.0)
        if number not in (1, 3):
            optimizer.step()
        optimizer.zero_grad()
    assert all(adapter.is_settled for adapter in layer_adapters(model, "default"))
    assert "leaves out a gradient of" in caplog.text
    assert all(torch.isfinite(adapter.basis.U if adapter.basis.V is None else adapter.basis.V).all()
               for adapter in layer_adapters(model, "default"))  # fmt: skip


def test_explicit_warm_up_on_zeros_is_refused_and_changes_nothing():
    model = adapted(warmup_steps=4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="the gradient of 4 batches was zero"):
        warmup(model, lambda: backward(model, 0, 0.0), steps=4, progress=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_explicit_warm_up_passes_over_batches_without_labels():
    batches = [batch(number) for number in range(4)]
    unlabelled = {**batch(9), "labels": torch.full_like(batch(9)["labels"], -100)}
    model, expected = adapted(warmup_steps=4), adapted(warmup_steps=4)
    report = warmup(model, [batches[0], unlabelled, *batches[1:]], steps=4, progress=False)
    warmup(expected, batches, steps=4, progress=False)
    assert report.passed_over == 1
    assert supports(model) == supports(expected)
    with pytest.raises(ValueError, match="ran dry after 0 of 2, and 3 more have no label"):
        warmup(adapted(warmup_steps=4), [unlabelled] * 3, steps=2, progress=False)


# Copies --------------------------------------------------------------------------------------------------------------


def test_adapter_with_the_configuration_object_of_another_starts_in_its_bases():
    """What TRL does for the reference in DPO, GRPO, KTO and RLOO."""
    model = adapted(warmup_steps=2, renewal_steps=3)
    warmup(model, [batch(number) for number in range(2)], progress=False)
    optimizer = sgd(model, lr=5.0)
    for number in range(5):
        backward(model, number)
        optimizer.step()
        optimizer.zero_grad()
    expected = logits(model)
    with pytest.warns(UserWarning, match="'ref' has the configuration object of 'default'"):
        model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    model.set_adapter("ref")
    assert torch.equal(logits(model), expected)
    model.set_adapter("default")
    backward(model, 5)
    optimizer.step()
    backward(model, 6)
    optimizer.step()
    model.set_adapter("ref")
    assert torch.equal(logits(model), expected), "it stays while the policy is renewed"


def test_state_dict_under_one_name_is_a_working_copy_under_another():
    model = adapted(renewal_steps=3, init_weights=False)
    optimizer = sgd(model)
    for number in range(4):
        backward(model, number)
        optimizer.step()
        optimizer.zero_grad()
    expected = logits(model)
    model.add_adapter("copy", SparseGradConfig(density=0.05, warmup_steps=0, task_type="CAUSAL_LM"))
    own = {name: tensor for name, tensor in model.state_dict().items() if ".default." in name}
    model.load_state_dict({name.replace(".default.", ".copy."): tensor for name, tensor in own.items()}, strict=False)
    model.set_adapter("copy")
    assert torch.equal(logits(model), expected)


def test_file_of_a_renewed_adapter_is_sorted_and_the_same(tmp_path):
    model = adapted(renewal_steps=2)
    optimizer = sgd(model)
    for number in range(5):
        backward(model, number)
        optimizer.step()
        optimizer.zero_grad()
    assert any((adapter.indices.diff() < 0).any() for adapter in layer_adapters(model, "default"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert all((adapter.indices.diff() > 0).all() for adapter in layer_adapters(loaded, "default"))
    assert torch.equal(logits(loaded), logits(model))
