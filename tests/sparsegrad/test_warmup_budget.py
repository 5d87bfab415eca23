"""Short runs without a warm-up of their own: they train, and can be saved and resumed at any step."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import adapted, batch, llama, logits, rows, train
from transformers import Trainer, TrainingArguments

from peft_sparsegrad import SparseGradCallback, SparseGradConfig, warmup, warmup_report
from peft_sparsegrad.sparsegrad.layer import layer_adapters

DEFAULT = SparseGradConfig().warmup_steps


def trainer(model, path, callbacks=(), eval_dataset=None, **settings):
    common = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "learning_rate": 0.05, "logging_steps": 1}
    arguments = TrainingArguments(
        str(path), **{"save_strategy": "no", "per_device_train_batch_size": 2, **common, **settings}
    )
    return Trainer(model, arguments, train_dataset=rows(64), eval_dataset=eval_dataset, callbacks=list(callbacks))


def norms(run):
    """Gradient norm of each step."""
    return [entry["grad_norm"] for entry in run.state.log_history if "grad_norm" in entry]


def num_steps(model):
    return {adapter.num_steps for adapter in layer_adapters(model, "default")}


@pytest.mark.parametrize(
    ("steps", "accumulation", "passes"), [(12, 1, 3), (3, 1, 2), (3, 4, 3), (6, 8, DEFAULT), (40, 1, DEFAULT)]
)
def test_a_trainers_run_trains_after_a_quarter_of_its_passes(tmp_path, caplog, steps, accumulation, passes):
    model = adapted(warmup_steps=DEFAULT)
    before = logits(model)
    run = trainer(model, tmp_path, max_steps=steps, gradient_accumulation_steps=accumulation)
    run.train()
    assert warmup_report(model).passes == passes
    assert not torch.equal(logits(model), before)
    idle = passes // accumulation  # steps whose passes all belong to the warm-up
    assert [norm > 0 for norm in norms(run)] == [False] * idle + [True] * (steps - idle)
    shortened = f"takes {passes} of this run's {steps * accumulation} passes, and not the {DEFAULT} asked for"
    assert (shortened in caplog.text) == (passes < DEFAULT)
    assert ("run `peft_sparsegrad.warmup` or `SparseGradCallback` before" in caplog.text) == (passes < DEFAULT)
    assert f"warm-up is done, the adapter 'default' trains from now on: {passes} backward passes" in caplog.text


@pytest.mark.parametrize("callbacks", [[], [SparseGradCallback()]])
@pytest.mark.parametrize("is_trainable", [True, False])
def test_an_adapter_that_was_loaded_has_no_warm_up_to_speak_of(tmp_path, caplog, callbacks, is_trainable):
    """Loaded for inference it is no matter of warm-ups either: torch's own error is all that is said."""
    trained = adapted(warmup_steps=DEFAULT)
    train(trained, steps=DEFAULT + 1)
    trained.save_pretrained(tmp_path / "adapter")
    caplog.clear()
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "adapter", is_trainable=is_trainable)
    run = trainer(loaded, tmp_path, callbacks, max_steps=4)
    if is_trainable:
        run.train()
        assert all(norm > 0 for norm in norms(run))
    else:
        with pytest.raises((ValueError, RuntimeError)):
            run.train()
    assert "warm-up" not in caplog.text


def test_lora_in_such_a_run_trains_from_its_first_step(tmp_path):
    model = get_peft_model(llama(), LoraConfig(target_modules=["up_proj"], task_type="CAUSAL_LM"))
    run = trainer(model, tmp_path, max_steps=3)
    run.train()
    assert all(norm > 0 for norm in norms(run))


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_that_ends_in_its_warm_up_says_so(tmp_path, caplog, steps):
    model = adapted(warmup_steps=DEFAULT)
    trainer(model, tmp_path, max_steps=steps).train()
    assert f"takes {steps} of this run's {steps} passes" in caplog.text
    assert "which leaves none to train the adapter" in caplog.text


def test_the_callback_leaves_a_short_run_all_of_its_steps(tmp_path, caplog):
    model, callback = adapted(warmup_steps=DEFAULT), SparseGradCallback()
    run = trainer(model, tmp_path, [callback], max_steps=3)
    run.train()
    assert num_steps(model) == {3}
    assert all(norm > 0 for norm in norms(run))
    assert callback.report.passes == DEFAULT
    assert callback.report.summary in caplog.text
    assert "of this run's" not in caplog.text


def test_a_checkpoint_in_the_warm_up_is_saved_and_resumed(tmp_path):
    model = adapted(warmup_steps=DEFAULT)
    settings = {"max_steps": 16, "save_strategy": "steps", "save_steps": 2}
    with pytest.warns(UserWarning, match="saved after 2 of the 4 passes of its warm-up, before any value"):
        trainer(model, tmp_path, **settings).train()
    assert num_steps(model) == {12}
    resumed = adapted(warmup_steps=DEFAULT)
    run = trainer(resumed, tmp_path, **settings)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert warmup_report(resumed).passes == 14 // 4
    assert num_steps(resumed) == {11}
    assert norms(run)[-1] > 0


def test_the_best_model_may_be_one_of_the_warm_up(tmp_path):
    """At a rate that ruins the model the best checkpoint is one in which nothing has been trained."""
    settings = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    model = adapted(warmup_steps=DEFAULT)
    run = trainer(
        model, tmp_path, eval_dataset=rows(8, seed=1), max_steps=8, learning_rate=1e3, load_best_model_at_end=True,
        **settings,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="saved after 1 of the 2 passes.*for a run this short, run `peft"):
        run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-1")
    assert torch.equal(logits(run.model), logits(llama()))


def test_a_plain_loop_that_ends_in_its_warm_up_says_so_when_it_is_saved(tmp_path):
    model = adapted(warmup_steps=DEFAULT)
    before = logits(model)
    train(model, steps=3)
    with pytest.warns(UserWarning, match=rf"after 3 of the {DEFAULT} passes.*set `warmup_steps=2`, or run") as caught:
        model.save_pretrained(tmp_path)
    assert sum("passes of its warm-up" in str(each.message) for each in caught) == 1
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert torch.equal(logits(loaded), before)
    train(loaded, steps=DEFAULT + 1)
    assert not torch.equal(logits(loaded), before)


@pytest.mark.parametrize("merge", [lambda model: model.merge_and_unload(), lambda model: model.merge_adapter()])
def test_a_plain_loop_that_ends_in_its_warm_up_says_so_when_it_is_merged(merge):
    model = adapted(warmup_steps=DEFAULT)
    train(model, steps=3)
    with pytest.warns(UserWarning, match=rf"merged after 3 of the {DEFAULT} passes.*stay as they are.*set `warmup_s"):
        merge(model)
    assert torch.equal(logits(model), logits(llama()))


@pytest.mark.parametrize("do", [lambda model: model.unload(), lambda model: model.merge_adapter(["trained"])])
def test_unloading_it_or_merging_another_adapter_says_nothing(do, recwarn):
    model = adapted(warmup_steps=DEFAULT)
    model.add_adapter("trained", SparseGradConfig(warmup_steps=0))
    train(model, steps=3)
    recwarn.clear()
    do(model)
    assert not [each for each in recwarn if "warm-up" in str(each.message)]


def test_a_plain_loop_is_told_at_its_first_pass_what_the_warm_up_takes(caplog):
    model = adapted(warmup_steps=DEFAULT)
    model(**batch())  # no pass of a training
    assert not caplog.text
    train(model, steps=3)
    told = f"takes the first {DEFAULT} backward passes, and the adapter trains after them: for a shorter loop set"
    assert caplog.text.count(told) == 1
    caplog.clear()
    train(adapted(warmup_steps=2), steps=1)
    assert "takes the first 2 backward passes" in caplog.text
    assert "for a shorter loop run `peft_sparsegrad.warmup`" in caplog.text


@pytest.mark.parametrize("way", ["warmup", "Trainer"])
def test_nothing_is_said_at_the_first_pass_where_the_length_is_known(tmp_path, caplog, way):
    model = adapted(warmup_steps=2)
    if way == "warmup":
        warmup(model, [batch(), batch()], progress=False)
    else:
        trainer(model, tmp_path, max_steps=8).train()
    assert "takes the first" not in caplog.text


def test_the_way_out_of_a_short_plain_loop():
    model = adapted(warmup_steps=2)
    before = logits(model)
    train(model, steps=3)
    assert not torch.equal(logits(model), before)


def test_passes_are_counted_where_a_plain_loop_accumulates():
    model = adapted(warmup_steps=4)
    before = logits(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for step in range(2):
        for part in range(4):
            model(**batch(part)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(logits(model), before) == (step == 0)
    assert warmup_report(model).passes == 4
