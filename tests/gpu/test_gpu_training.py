"""Training runs on the device, which follow those of the float64 twin on the CPU; LoRA is the control."""

from __future__ import annotations

import pytest
import torch
from gpu_twins import (
    CONFIGS,
    attached,
    batch_on,
    change_of_output,
    disturb,
    double_twin,
    graddrop,
    lora,
    outcome,
    relative_error,
    small_llama,
    sparsegrad,
    train_on_device,
    trained,
)
from peft import get_peft_model
from tiny import batch

import peft_sparsegrad
from peft_sparsegrad import GradDropConfig
from peft_sparsegrad.graddrop import VARIANTS
from peft_sparsegrad.sparsegrad.layer import layer_adapters

RUNS = {
    "lora": lora,
    "sparsegrad": lambda: sparsegrad(warmup_steps=8, renewal_steps=4),
    "full-bases": lambda: sparsegrad("full-bases", warmup_steps=8, renewal_steps=4),
    "paper": lambda: sparsegrad("paper", warmup_steps=8),
    "meprop": lambda: sparsegrad("meprop", warmup_steps=8),
    "graddrop": graddrop,
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_steps_warm_up_and_renewals_is_the_twins(name, device):
    """Rounding may exchange entries that are almost level, in each step of a dynamic support."""
    model = attached(RUNS[name]())
    twin = double_twin(model)
    losses = train_on_device(model.to(device), 32)
    assert losses == pytest.approx(train_on_device(twin, 32), rel=1e-3)
    assert losses[-1] < losses[0]
    assert relative_error(change_of_output(model), change_of_output(twin)) < (0.3 if name == "paper" else 0.05)


@pytest.mark.parametrize("variant", ["sparsegrad", "full-bases", "meprop"])
def test_a_warm_up_finds_the_twins_bases_and_supports(variant, device):
    model = attached(sparsegrad(variant, warmup_steps=8))
    twin = double_twin(model)
    batches = [batch(seed) for seed in range(8)]
    report = peft_sparsegrad.warmup(model.to(device), batches, progress=False)
    expected = peft_sparsegrad.warmup(twin, batches, progress=False)
    for group, other in zip(report.groups, expected.groups, strict=True):
        assert group.energy_in_core == pytest.approx(other.energy_in_core, rel=1e-4)
        assert group.energy_in_support == pytest.approx(other.energy_in_support, rel=1e-3)
    for adapter, other in zip(layer_adapters(model, "default"), layer_adapters(twin, "default"), strict=True):
        assert adapter.values.device == device
        assert_same_span(adapter.basis.U, other.basis.U)
        assert_same_span(adapter.basis.V, other.basis.V)
        chosen, others = set(adapter.indices.tolist()), set(other.indices.tolist())
        assert len(chosen & others) >= 0.97 * len(others)


def assert_same_span(columns: torch.Tensor | None, others: torch.Tensor | None) -> None:
    """Compare the column spaces of two matrices; the columns themselves may have another sign."""
    if columns is None or others is None:
        assert columns is others
        return
    found, true = columns.cpu().double(), others.double()
    assert relative_error(found @ found.T, true @ true.T) < 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_graddrop_draws_the_masks_of_the_cpu(variant, device):
    """Which gradients are exactly zero, in two steps of each of two epochs."""
    config = GradDropConfig.from_variant(variant, num_epochs=3, task_type="CAUSAL_LM")
    model, other = get_peft_model(small_llama(), config).to(device), get_peft_model(small_llama(), config)
    for epoch in range(2):
        kept = [kept_entries(each, epoch) for each in (model, other)]
        assert kept[0].shape == kept[1].shape
        assert torch.equal(*kept)
        assert 0 < kept[0].sum() < kept[0].numel()


def kept_entries(model, epoch: int) -> torch.Tensor:
    """Which entries of all that trains have a gradient that is not zero, in two steps."""
    masks, kept = peft_sparsegrad.GradDrop(model), []
    masks.set_epoch(epoch)
    for step in range(2):
        masks.set_step(2 * epoch + step)
        model(**batch_on(next(model.parameters()).device)).loss.backward()
        kept += [_kept(parameter) for parameter in trained(model).values()]
        model.zero_grad()
    return torch.cat(kept)


def _kept(parameter: torch.nn.Parameter) -> torch.Tensor:
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return (gradient != 0).flatten().cpu()


@pytest.mark.parametrize("name", CONFIGS)
def test_checkpointed_activations_give_the_same_gradient(name, device):
    model = attached(CONFIGS[name]()).to(device)
    disturb(model)
    _, plain = outcome(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert relative_error(outcome(model)[1], plain) < 1e-6


@pytest.mark.parametrize("name", ["lora", "sparsegrad", "graddrop"])
def test_a_compiled_step_gives_the_same_gradient(name, device):
    """With Inductor on a GPU, where Triton is."""
    model = attached(CONFIGS[name](), blocks=1).to(device)
    disturb(model)
    expected = outcome(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager" if device.type == "cpu" else "inductor")
    for found, plain in zip(outcome(compiled), expected, strict=True):
        assert relative_error(found, plain) < 1e-5


@pytest.mark.parametrize("name", RUNS)
def test_a_float16_scaler_skips_what_overflows_and_trains_on(name, device):
    """The first passes overflow, those of a warm-up among them."""
    model = attached(RUNS[name]()).to(device)
    optimizer = peft_sparsegrad.create_sparsegrad_optimizer(model, 0.01) if name == "paper" else adamw(model)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**40, backoff_factor=2.0**-10)
    losses = []
    for step in range(36):
        with torch.autocast(device.type, torch.float16):
            loss = model(**batch_on(device, seed=step % 4)).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert scaler.get_scale() < 2.0**40
    assert all(torch.isfinite(parameter).all() for parameter in trained(model).values())
    assert max(losses[-4:]) < min(losses[:4])


def adamw(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model).values(), lr=0.01)
