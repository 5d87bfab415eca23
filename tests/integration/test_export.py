"""Adapted models as programs for other places: `torch.export`, and TorchScript's tracing."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import adapted, batch, llama, train
from versions import needs_export

from benchmarks.features.attempts import Logits
from peft_sparsegrad import GradDropConfig, SparseGradConfig

pytestmark = needs_export
KINDS = {
    "LoRA": LoraConfig(target_modules=["up_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    "SparseGrad": SparseGradConfig(warmup_steps=2, task_type="CAUSAL_LM"),
    "columns": SparseGradConfig.from_variant("columns", warmup_steps=2, task_type="CAUSAL_LM"),
    "paper": SparseGradConfig.from_variant("paper", warmup_steps=2, task_type="CAUSAL_LM"),
    "GradDrop": GradDropConfig(task_type="CAUSAL_LM"),
}


def trained(kind: str):
    model = get_peft_model(llama(), copy.deepcopy(KINDS[kind]))
    train(model, 4)
    return model.eval()


def exported(model, strict: bool = False):
    """Export a model for batches of any size and length."""
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("tokens", max=64)}
    return torch.export.export(Logits(model), (batch()["input_ids"],), dynamic_shapes=(sizes,), strict=strict).module()


def check_same(program, model):
    for ids in (batch(3)["input_ids"], batch(4, size=5)["input_ids"][:, :7]):
        with model.disable_adapter():
            base = Logits(model)(ids)
        expected = Logits(model)(ids)
        assert not torch.equal(expected, base)
        torch.testing.assert_close(program(ids), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_program_computes_what_the_model_does_for_other_shapes(kind):
    model = trained(kind)
    check_same(exported(model), model)


@pytest.mark.parametrize("kind", ["SparseGrad", "columns"])
def test_a_strict_export_and_a_trace_compute_what_the_model_does(kind):
    model = trained(kind)
    check_same(exported(model, strict=True), model)
    program = torch.jit.trace(Logits(model), (batch(5)["input_ids"],), check_trace=False)
    ids = batch(6)["input_ids"]
    torch.testing.assert_close(program(ids), Logits(model)(ids))


@pytest.mark.parametrize("kind", ["SparseGrad", "columns", "GradDrop"])
def test_a_loaded_adapter_is_exported_without_a_pass_before(kind, tmp_path):
    model = trained(kind)
    model.save_pretrained(tmp_path)
    check_same(exported(PeftModel.from_pretrained(llama(), tmp_path).eval()), model)


def test_a_copy_is_exported_as_itself():
    model = trained("SparseGrad")
    other = copy.deepcopy(model)
    train(other, 4)
    check_same(exported(other.eval()), other)
    check_same(exported(model), model)


def test_training_goes_on_after_an_export():
    alone, exports = adapted(warmup_steps=4), adapted(warmup_steps=4)
    exported(exports.eval())  # in the warm-up, when nothing has trained
    for model in (alone, exports):
        train(model.train(), 8)
    exported(exports.eval())
    for model in (alone, exports):
        train(model.train(), 8)
    assert all(map(torch.equal, alone.parameters(), exports.parameters()))


def test_buffers_that_were_written_to_are_refused_until_a_pass_has_seen_them():
    model = trained("SparseGrad")
    slots = next(buffer for name, buffer in model.named_buffers() if name.endswith("slots"))
    slots.copy_(slots.flip(0))
    with pytest.raises(RuntimeError, match="call the model once"):
        exported(model)
    Logits(model)(batch()["input_ids"])
    check_same(exported(model), model)
