"""transformers' Trainer: nothing called, the callback, the dynamic optimizer, checkpoints and resume."""

import pytest
import torch
from tiny import LENGTH, adapted, bert, llama, logits, rows
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from peft_sparsegrad import SparseGradCallback, SparseGradLinear, create_sparsegrad_optimizer
from peft_sparsegrad.sparsegrad.layer import layer_adapters


def arguments(path, **settings):
    defaults = {"max_steps": 12, "save_steps": 8, "logging_steps": 4, "per_device_train_batch_size": 4}
    common = {"learning_rate": 1e-2, "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 3}
    return TrainingArguments(str(path), **{**defaults, **common, **settings})


def trainer(model, path, callbacks=(), optimizer=False, **settings):
    optimizers = (create_sparsegrad_optimizer(model, lr=1e-2), None) if optimizer else (None, None)
    return Trainer(
        model, arguments(path, **settings), train_dataset=rows(64), eval_dataset=rows(16, seed=1),
        callbacks=list(callbacks), optimizers=optimizers,
    )  # fmt: skip


def trained(model):
    return {name: p.detach().clone() for name, p in model.state_dict().items() if "sparsegrad_" in name}


def model_for(support):
    """With dropout, so that the random state matters."""
    return adapted(llama(attention_dropout=0.1), warmup_steps=4, support=support)


def callbacks_of(kind):
    return [SparseGradCallback(steps=3)] if kind == "callback" else []


@pytest.mark.parametrize("warm_up", ["nothing called", "callback"])
@pytest.mark.parametrize("support", ["static", "dynamic"])
def test_resumed_run_is_the_uninterrupted_run_bit_for_bit(tmp_path, warm_up, support):
    def run(path, resume=None, **settings):
        model = model_for(support)
        run = trainer(model, path, callbacks_of(warm_up), optimizer=support == "dynamic", **settings)
        run.train(resume_from_checkpoint=resume)
        return trained(model)

    through = run(tmp_path / "through")
    resumed = run(tmp_path / "other", resume=str(tmp_path / "through" / "checkpoint-8"))
    assert through.keys() == resumed.keys()
    assert all(torch.equal(through[name], resumed[name]) for name in through)
    assert any(value.any() for name, value in through.items() if "values" in name)


def renewing_run(path, seed=3, resume=None):
    """17 steps with renewals after 4, 8 and 16, and checkpoints after 6 and 12."""
    run = trainer(
        adapted(llama(attention_dropout=0.1), warmup_steps=4, renewal_steps=4), path, [SparseGradCallback(steps=3)],
        max_steps=17, save_steps=6, seed=seed,
    )  # fmt: skip
    run.train(resume_from_checkpoint=resume)
    return trained(run.model)


@pytest.mark.parametrize("saved_at", [6, 12])
def test_run_resumed_between_renewals_is_the_uninterrupted_run_bit_for_bit(tmp_path, saved_at):
    through = renewing_run(tmp_path)
    resumed = renewing_run(tmp_path, resume=str(tmp_path / f"checkpoint-{saved_at}"))
    assert through.keys() == resumed.keys()
    assert all(torch.equal(through[name], resumed[name]) for name in through)


def test_optimizer_without_the_order_of_its_values_is_refused(tmp_path):
    """The adapter's file has the values in another order than the moments of the run that saved it."""
    renewing_run(tmp_path)
    saved = torch.load(tmp_path / "checkpoint-12" / "optimizer.pt")
    for group in saved["param_groups"]:
        group.pop("sparsegrad", None)
    torch.save(saved, tmp_path / "checkpoint-12" / "optimizer.pt")
    with pytest.raises(RuntimeError, match="a state without the order of the SparseGrad values"):
        renewing_run(tmp_path, resume=str(tmp_path / "checkpoint-12"))


def test_optimizer_of_another_run_is_refused(tmp_path):
    renewing_run(tmp_path / "one")
    renewing_run(tmp_path / "other", seed=4)
    other = tmp_path / "other" / "checkpoint-12" / "optimizer.pt"
    other.replace(tmp_path / "one" / "checkpoint-12" / "optimizer.pt")
    with pytest.raises(RuntimeError, match=r"state is for other entries of .* from the same checkpoint"):
        renewing_run(tmp_path / "one", resume=str(tmp_path / "one" / "checkpoint-12"))


def test_nothing_called_trains(tmp_path):
    model = adapted(warmup_steps=4)
    run = trainer(model, tmp_path, max_steps=40, save_strategy="no", logging_steps=10, learning_rate=0.05)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.05


def test_callback_logs_the_energy_captured_and_keeps_the_report(tmp_path):
    callback = SparseGradCallback(steps=3)
    run = trainer(adapted(warmup_steps=4), tmp_path, [callback], save_strategy="no")
    run.train()
    assert callback.report.passes == 3
    measured = [entry for entry in run.state.log_history if "sparsegrad_energy_in_core" in entry]
    assert len(measured) == 3
    for entry in measured:
        assert 0 < entry["sparsegrad_energy_in_support"] <= entry["sparsegrad_energy_in_core"] <= 1


def test_callback_does_not_change_what_training_sees(tmp_path):
    """The Trainer's data order and dropout are the same with and without the warm-up before it."""
    seen = {}

    class Recording(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.setdefault(self.name, []).append((inputs["input_ids"].clone(), torch.rand(1)))
            return super().compute_loss(model, inputs, *args, **kwargs)

    for name, callbacks in (("with", [SparseGradCallback(steps=3)]), ("without", [])):
        settings = arguments(tmp_path, max_steps=5, save_strategy="no", num_train_epochs=1)
        run = Recording(
            adapted(warmup_steps=0 if name == "without" else 4), settings, train_dataset=rows(64), callbacks=callbacks
        )
        run.name = name
        run.train()
    assert len(seen["with"]) == 3 + 5, "three batches before"
    for (ids, noise), (other_ids, other_noise) in zip(seen["with"][3:], seen["without"], strict=True):
        assert torch.equal(ids, other_ids)
        assert torch.equal(noise, other_noise)


@pytest.mark.parametrize("bf16", [True, False])
def test_warm_up_runs_in_the_trainers_precision(tmp_path, bf16):
    model, seen = adapted(llama(), warmup_steps=4), []
    model.get_base_model().lm_head.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    trainer(model, tmp_path, [SparseGradCallback()], max_steps=1, bf16=bf16, use_cpu=True).train()
    assert seen == [bf16] * 5, "four batches, and a step"


def test_callback_outside_of_a_trainer_is_refused(tmp_path):
    model = adapted(warmup_steps=4)
    made = trainer(model, tmp_path)
    with pytest.raises(RuntimeError, match=r"call `peft_sparsegrad\.warmup"):
        SparseGradCallback().on_train_begin(
            made.args, made.state, made.control, model=model, train_dataloader=made.get_train_dataloader()
        )


EVEN = torch.arange(LENGTH) % 2 == 0


class OddTokens(Trainer):
    """A Trainer whose own loss counts every second token."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**{**inputs, "labels": inputs["labels"].masked_fill(EVEN, -100)})
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def test_callback_looks_at_the_loss_that_is_trained(tmp_path):
    def supports(kind, dataset):
        model = adapted(warmup_steps=4)
        settings = arguments(tmp_path, max_steps=1, save_strategy="no")
        kind(model, settings, train_dataset=dataset, callbacks=[SparseGradCallback(steps=6)]).train()
        return [layer.indices.tolist() for layer in layer_adapters(model, "default")]

    masked = [{**row, "labels": [-100 if i % 2 == 0 else y for i, y in enumerate(row["labels"])]} for row in rows(64)]
    assert supports(OddTokens, rows(64)) == supports(Trainer, masked) != supports(Trainer, rows(64))


def test_callback_passes_over_batches_without_labels(tmp_path):
    """Every second row of the data has no label; a batch is one row."""
    dataset = [{**row, "labels": [-100] * LENGTH} if i % 2 else row for i, row in enumerate(rows(16))]
    model, callback = adapted(warmup_steps=4), SparseGradCallback(steps=8)
    settings = arguments(tmp_path, max_steps=1, save_strategy="no", per_device_train_batch_size=1)
    Trainer(model, settings, train_dataset=dataset, callbacks=[callback]).train()
    assert callback.report.passes == 8
    assert callback.report.passed_over > 4
    assert "without a gradient passed over" in str(callback.report)


class ReadOnce(IterableDataset):
    """A stream: each row can be read a single time."""

    def __init__(self, rows):
        self.rows, self.read = iter(rows), 0

    def __iter__(self):
        for row in self.rows:
            self.read += 1
            yield row


def test_callback_reads_nothing_ahead_of_a_stream(tmp_path, caplog):
    stream, model, callback = ReadOnce(rows(64)), adapted(warmup_steps=32), SparseGradCallback(steps=6)
    settings = arguments(tmp_path, max_steps=16, save_steps=3)
    run = Trainer(model, settings, train_dataset=stream, callbacks=[callback])
    run.train()
    assert "takes 4 of this run's 16 passes, and not the 6 asked for" in caplog.text
    assert "For more, run `peft_sparsegrad.warmup` before" in caplog.text, "the callback is there already"
    assert "observes the first 4 passes of training" in caplog.text
    assert callback.report.passes == 4
    assert run.state.global_step == 16, "64 rows are 16 batches"
    assert all(each.values.any() for each in layer_adapters(model, "default"))


def test_head_settles_first(tmp_path):
    rows_ = [{"input_ids": row["input_ids"], "labels": row["input_ids"][0] % 2} for row in rows(32)]
    model = adapted(bert(), task_type="SEQ_CLS", warmup_steps=4)
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad and "classifier" in name}
    heads = {}

    class Look(SparseGradCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                heads.update({name: p.clone() for name, p in kwargs["model"].named_parameters() if name in before})
            super().on_step_begin(args, state, control, **kwargs)

    settings = arguments(tmp_path, max_steps=2, save_strategy="no")
    Trainer(model, settings, train_dataset=rows_, callbacks=[Look(steps=2, head_steps=5)]).train()
    assert before
    assert all(not torch.equal(heads[name], value) for name, value in before.items())


def test_head_steps_without_a_head_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing besides SparseGrad trains"):
        trainer(adapted(warmup_steps=4), tmp_path, [SparseGradCallback(head_steps=5)]).train()


def test_callback_refuses_a_model_without_the_adapter(tmp_path):
    with pytest.raises(ValueError, match="the model has no SparseGrad adapter: call"):
        trainer(llama(), tmp_path, [SparseGradCallback()]).train()


def test_best_model_is_loaded_at_the_end(tmp_path):
    model = adapted(warmup_steps=4)
    run = trainer(
        model, tmp_path, max_steps=18, save_steps=6, eval_steps=6, eval_strategy="steps", learning_rate=0.5,
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=False,
    )  # fmt: skip
    run.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    assert run.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert run.evaluate()["eval_loss"] == pytest.approx(losses[best], abs=1e-6)


@pytest.mark.parametrize("support", ["static", "dynamic"])
def test_accumulation_and_clipping_run_with_the_dynamic_optimizer(tmp_path, support):
    model = adapted(support=support)
    before = logits(model)
    run = trainer(
        model, tmp_path, optimizer=True, gradient_accumulation_steps=2, max_grad_norm=0.1, save_strategy="no"
    )
    run.train()
    assert not torch.equal(logits(model), before)
    for layer in (module for module in model.modules() if isinstance(module, SparseGradLinear)):
        adapter = layer.adapter("default")
        plan, values = adapter.plan, adapter.values
        assert int((values != 0).sum()) <= 12 * 2 * plan.k
