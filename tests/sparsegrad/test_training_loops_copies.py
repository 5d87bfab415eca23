"""An adapter that has been renewed, copied under another name or saved, computes the same."""

import pytest
import torch
from peft import PeftModel
from tiny import adapted, batch, llama, logits
from training_loop_tools import backward, sgd

from peft_sparsegrad import SparseGradConfig, warmup
from peft_sparsegrad.sparsegrad.layer import layer_adapters


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
