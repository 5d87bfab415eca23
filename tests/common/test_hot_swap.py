"""Another adapter in the place of one that is loaded, compiled models included; beside it LoRA's `hotswap_adapter`."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from tiny import batch, llama, logits, train
from torch._dynamo.testing import CompileCounterWithBackend
from versions import needs_one_graph

from peft_sparsegrad import GradDropConfig, SparseGradConfig, warmup
from peft_sparsegrad.sparsegrad.layer import layer_adapters

TARGETS = ["up_proj", "down_proj"]
METHODS = {
    "lora": lambda: LoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM"),
    "sparsegrad": lambda: SparseGradConfig(target_modules=TARGETS, density=0.05, task_type="CAUSAL_LM"),
    "graddrop": lambda: GradDropConfig(target_modules=TARGETS, task_type="CAUSAL_LM"),
}
OURS = ["sparsegrad", "graddrop"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two trained adapters of each method, and the outputs of the model with each."""
    folder = tmp_path_factory.mktemp("adapters")
    outputs = {}
    for method, config in METHODS.items():
        for seed in (1, 2):
            model = get_peft_model(llama(), config())
            if method == "sparsegrad":  # bases and supports of its own
                warmup(model, [batch(10 * seed), batch(10 * seed + 1)], progress=False)
            train(model, steps=seed)
            path = folder / method / str(seed)
            model.save_pretrained(path)
            outputs[method, seed] = logits(PeftModel.from_pretrained(llama(), path))
        assert not torch.allclose(outputs[method, 1], outputs[method, 2])
    return folder, outputs


def loaded(saved, method, seed=1):
    return PeftModel.from_pretrained(llama(), saved[0] / method / str(seed))


@pytest.mark.parametrize(("method", "other"), [(one, other) for one in OURS for other in METHODS if other != one])
def test_an_adapter_of_another_method_is_said_to_be_one(saved, method, other):
    folder, outputs = saved
    model = loaded(saved, method)
    with pytest.raises(ValueError, match=r"is no \w+ adapter but one of another method.*`PeftModel.from_pretrained`"):
        swap(model, folder / other / "1")
    assert torch.equal(logits(model), outputs[method, 1])


def swap(model, path):
    if model.peft_type == "LORA":
        hotswap_adapter(model, str(path), "default")
    else:
        model.load_adapter(path, "default")


@pytest.mark.parametrize("method", METHODS)
def test_the_outputs_are_those_of_the_adapter_swapped_in(saved, method):
    folder, outputs = saved
    model = loaded(saved, method)
    for seed in (2, 1):
        swap(model, folder / method / str(seed))
        assert torch.equal(logits(model), outputs[method, seed])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_model_is_not_compiled_again(saved, method):
    folder, outputs = saved
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model = loaded(saved, method)
    compiled = torch.compile(model, backend=counter)
    assert torch.allclose(logits(compiled), outputs[method, 1])
    before = counter.frame_count
    swap(model, folder / method / "2")
    assert torch.allclose(logits(compiled), outputs[method, 2])
    assert counter.frame_count == before > 0


@needs_one_graph
def test_a_compiled_layer_takes_the_support_that_is_loaded():
    torch._dynamo.reset()
    config = SparseGradConfig(target_modules=["0"], density=0.2, warmup_steps=0, init_weights=False)
    one, other = (get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 6)), config) for _ in range(2))
    (adapter,) = layer_adapters(other, "default")
    adapter.place(torch.arange(adapter.plan.k))
    one.load_state_dict(one.state_dict())
    counter, x = CompileCounterWithBackend("eager"), torch.randn(2, 8)
    compiled = torch.compile(one, backend=counter)
    with torch.no_grad():
        assert not torch.allclose(compiled(x), other(x))
        one.load_state_dict(other.state_dict())
        torch.testing.assert_close(compiled(x), other(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("method", OURS)
def test_a_merged_adapter_is_not_swapped(saved, method):
    """Unmerging would then subtract what was not added. PEFT's `load_adapter` does so with LoRA."""
    folder, outputs = saved
    model = loaded(saved, method)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"'default' is merged, .* `model.unmerge_adapter\(\)`"):
        swap(model, folder / method / "2")
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), outputs[method, 1])


@pytest.mark.parametrize("method", OURS)
def test_an_adapter_of_other_layers_is_not_swapped_in(saved, tmp_path, method):
    outputs = saved[1][method, 1]
    config = METHODS[method]()
    config.target_modules = ["gate_proj"]
    get_peft_model(llama(), config).save_pretrained(tmp_path)
    model = loaded(saved, method)
    with pytest.raises(ValueError, match=r"gate_proj|up_proj|down_proj"):
        swap(model, tmp_path)
    assert torch.equal(logits(model), outputs)


@pytest.mark.parametrize("method", OURS)
def test_pefts_own_function_refuses_what_is_not_lora(saved, method):
    model = loaded(saved, method)
    with pytest.raises(ValueError, match=f"only supports LORA but {method.upper()} was passed"):
        hotswap_adapter(model, str(saved[0] / method / "2"), "default")
