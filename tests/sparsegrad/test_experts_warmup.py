"""Warm-up and renewal of each expert's support, also of one that gets no token."""

import logging

import torch
from expert_tools import adapted
from mixtures import EXPERTS, ids, loss, mixtral, train

from peft_sparsegrad import warmup
from peft_sparsegrad.sparsegrad.layer import layer_adapters


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
