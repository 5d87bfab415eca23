"""Renewals go on after copying, saving, loading and merging, and in a Trainer run that is resumed."""

import copy
import io
import itertools

import pytest
import torch
from fresh import run_program
from peft import PeftModel
from renewal_tools import counted, layers, run_of, supports
from tiny import adapted, llama, logits, rows
from transformers import Trainer, TrainerCallback, TrainingArguments


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copy_renews_by_itself(how):
    model = adapted(renewal_steps=4)
    run_of(model, steps=2)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    before = supports(model)
    run_of(twin, steps=2)
    assert (counted(twin), counted(model)) == ({4}, {2})
    assert supports(model) == before != supports(twin)
    run_of(model, steps=2)
    assert supports(model) == supports(twin)


def test_steps_survive_save_and_load_in_a_fresh_process(tmp_path):
    model = adapted(renewal_steps=4)
    run_of(model, steps=6)  # the next renewal is at 8
    model.save_pretrained(tmp_path)
    code = """
import sys, torch, peft_sparsegrad
from peft import PeftModel
from tiny import llama, train
from peft_sparsegrad import SparseGradLinear
model = PeftModel.from_pretrained(llama(), sys.argv[1], is_trainable=True)
layers = [module for module in model.modules() if isinstance(module, SparseGradLinear)]
supports = lambda: [layer.adapter("default").indices.tolist() for layer in layers]
assert {layer.adapter("default").num_steps for layer in layers} == {6}
before = supports()
train(model, steps=1)
assert supports() == before
train(model, steps=1)
assert supports() != before
after = supports()
train(model, steps=7)
assert supports() == after
train(model, steps=1)
assert supports() != after
"""
    done = run_program("-c", code, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("how", ["from_pretrained", "load_adapter"])
def test_loaded_adapter_trains_on(tmp_path, how, low_cpu_mem_usage):
    model = adapted(renewal_steps=4)
    run_of(model, steps=5)
    model.save_pretrained(tmp_path)
    settings = {"is_trainable": True, "low_cpu_mem_usage": low_cpu_mem_usage}
    if how == "from_pretrained":
        loaded, name = PeftModel.from_pretrained(llama(), tmp_path, **settings), "default"
    else:
        loaded, name = adapted(), "other"
        loaded.load_adapter(tmp_path, adapter_name=name, **settings)
        loaded.set_adapter(name)
    for layer in layers(loaded):
        assert layer.adapter(name).gradient_sum is None
    before = supports(loaded, name)
    assert [sorted(each) for each in supports(model)] == before
    run_of(loaded, steps=3)
    assert counted(loaded, name) == {8}
    assert supports(loaded, name) != before


def test_loading_into_an_adapter_in_training_forgets_the_sum(tmp_path):
    model = adapted(renewal_steps=9)
    model.save_pretrained(tmp_path)
    run_of(model, steps=2)
    model.load_adapter(tmp_path, adapter_name="default", is_trainable=True)
    assert counted(model) == {0}
    assert {layer.adapter("default").gradient_sum for layer in layers(model)} == {None}


def test_adapter_for_inference_has_no_sum(tmp_path):
    model = adapted(renewal_steps=2)
    run_of(model, steps=3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert {layer.adapter("default").gradient_sum for layer in layers(loaded)} == {None}
    assert torch.equal(logits(loaded), logits(model))


def test_merged_after_renewals():
    model = adapted(renewal_steps=2)
    run_of(model, steps=6, lr=0.1)
    expected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    run_of(model, steps=1)
    assert counted(model) == {7}


@pytest.mark.parametrize("saved_at", [6, 8])
def test_trainer_resumes_between_renewals(tmp_path, saved_at):
    """The adapter and the optimizer together hold everything, without a callback, also in another folder."""

    def run(path, resume=None):
        model = adapted(renewal_steps=4)
        arguments = TrainingArguments(
            str(path), max_steps=17, save_steps=saved_at, per_device_train_batch_size=4, learning_rate=0.02,
            report_to=[], disable_tqdm=True, use_cpu=True, seed=3,
        )  # fmt: skip
        seen = [(0, supports(model))]

        class Look(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                seen.append((state.global_step, supports(model)))

        Trainer(model, arguments, train_dataset=rows(64), callbacks=[Look()]).train(resume_from_checkpoint=resume)
        return model, [number for (_, old), (number, new) in itertools.pairwise(seen[1:]) if old != new]

    through, renewals = run(tmp_path / "through")
    assert renewals == [4, 8, 16]
    resumed, later = run(tmp_path / "other", resume=str(tmp_path / "through" / f"checkpoint-{saved_at}"))
    assert counted(resumed) == {17}
    assert later == ([8, 16] if saved_at == 6 else [16])
    assert supports(resumed) == supports(through)
    assert torch.equal(logits(resumed), logits(through))


def test_values_without_their_support_are_refused_and_change_nothing():
    """As of a loop that keeps the best trainable parameters, and puts them back after a renewal."""
    model = adapted(warmup_steps=0, renewal_steps=3)
    run_of(model, steps=2)
    best = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = logits(model)
    run_of(model, steps=4)
    trained = logits(model)
    with pytest.raises(RuntimeError, match=r"comes without its support.*get_peft_model_state_dict\(model\)"):
        model.load_state_dict(best, strict=False)
    assert torch.equal(logits(model), trained)
    model.load_state_dict(whole)
    assert torch.equal(logits(model), before)


def test_values_alone_can_be_put_back_where_no_support_changes():
    model = adapted(warmup_steps=0, renewal_steps=0)
    best = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    before = logits(model)
    run_of(model, steps=2)
    assert not torch.equal(logits(model), before)
    model.load_state_dict(best, strict=False)
    assert torch.equal(logits(model), before)
