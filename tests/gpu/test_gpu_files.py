"""Adapters that are merged on the device, and that go to files and between devices; LoRA is the control."""

from __future__ import annotations

import pytest
import torch
from gpu_twins import (
    CONFIGS,
    attached,
    disturb,
    logits_on,
    lora,
    relative_error,
    small_llama,
    sparsegrad,
    train_on_device,
)
from peft import PeftModel

from peft_sparsegrad.sparsegrad.layer import layer_adapters

METHODS = pytest.mark.parametrize("name", CONFIGS)
CPU = torch.device("cpu")


@METHODS
def test_a_merge_on_the_device_changes_no_output_and_is_taken_back(name, device):
    model = attached(CONFIGS[name]()).to(device)
    disturb(model)
    expected = logits_on(model)
    model.merge_adapter()
    assert relative_error(logits_on(model), expected) < 1e-5
    model.unmerge_adapter()
    assert relative_error(logits_on(model), expected) < 1e-5
    assert relative_error(logits_on(model.merge_and_unload()), expected) < 1e-5


@METHODS
@pytest.mark.parametrize("saved_on", ["device", "cpu"])
def test_an_adapter_goes_through_a_file_to_the_other_device(name, saved_on, device, tmp_path):
    """`torch_device` is a string with an index, such as `"cuda:0"`."""
    first, second = (device, CPU) if saved_on == "device" else (CPU, device)
    model = attached(CONFIGS[name]()).to(first)
    disturb(model)
    model.save_pretrained(tmp_path)
    base = small_llama().to(second)
    loaded = PeftModel.from_pretrained(base, str(tmp_path), torch_device=str(second))
    assert {tensor.device for tensor in (*loaded.parameters(), *loaded.buffers())} == {second}
    assert relative_error(logits_on(loaded), logits_on(model)) < 1e-5


@pytest.mark.parametrize(
    "config", [lora, lambda: sparsegrad(warmup_steps=4, renewal_steps=2)], ids=["lora", "sparsegrad"]
)
def test_a_model_that_moves_between_devices_trains_on(config, device):
    """From the device to the CPU and back, with the trained values, the support and the sums for its renewal."""
    model = attached(config()).to(device)
    train_on_device(model, 9)
    expected = logits_on(model)
    model.to("cpu")
    assert relative_error(logits_on(model), expected) < 1e-5
    losses = train_on_device(model.to(device).train(), 6)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert {adapter.num_steps for adapter in layer_adapters(model, "default")} <= {9 - 4 + 6}
