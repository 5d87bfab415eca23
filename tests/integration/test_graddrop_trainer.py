"""GradDrop in transformers' Trainer, in Accelerate and in loops of one's own, with its adapter and on other models."""

import itertools
import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from fresh import run_program
from peft import LoraConfig, get_peft_model
from tiny import adapted, batch, bert, llama, logits, rows
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_sparsegrad import (
    GradDrop,
    GradDropCallback,
    GradDropConfig,
    GradDropLayer,
    SparseGradCallback,
    create_sparsegrad_optimizer,
)
from peft_sparsegrad.graddrop.blocks import block_of, find_blocks
from peft_sparsegrad.graddrop.mask_sampler import MaskSampler

VARIANTS = [
    "GradDrop",
    "Layer-GradDrop",
    "Anneal-GradDrop",
    "GradDrop-Epoch",
    "GradDrop-Epoch-Toggle",
    "GradFreeze-TopDown",
]
EPOCHS, STEPS_IN_EPOCH = 3, 4  # 7 micro-batches an epoch: the last step of an epoch has one, the others two
OTHERS = ["full", "lora", "sparsegrad", "sparsegrad, warm-up"]  # models without the adapter
MASKED = {"p": 0.5, "frozen": "hold"}  # so that an entry moves if and only if it is kept


def often(cases, in_every_run):
    """Return the cases, of which those outside of `in_every_run` are slow tests: they repeat the others' subject."""
    marks = {False: [pytest.mark.slow], True: []}
    return [pytest.param(*([c] if isinstance(c, str) else c), marks=marks[c in in_every_run]) for c in cases]


def trainer(model, path, callbacks=(), kind=Trainer, dataset=None, **settings):
    defaults = {"num_train_epochs": EPOCHS, "save_strategy": "no", "logging_steps": STEPS_IN_EPOCH}
    defaults |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "weight_decay": 0.1}
    common = {"learning_rate": 1e-2, "max_grad_norm": 0.5, "report_to": [], "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments(str(path), **{**defaults, **common, "seed": 3, **settings})
    return kind(
        model, arguments, train_dataset=dataset or rows(28), eval_dataset=rows(16, seed=1), callbacks=list(callbacks)
    )


def graddrop(variant="GradDrop", **overrides):
    """With dropout, so that the random state matters."""
    config = GradDropConfig.from_variant(variant, task_type="CAUSAL_LM", **overrides)
    return get_peft_model(llama(attention_dropout=0.1), config)


def other(name):
    model = llama(attention_dropout=0.1)
    if name == "full":
        return model
    if name == "lora":
        return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    return adapted(model, warmup_steps=4 if "warm-up" in name else 0)


def callbacks_for(name, config):
    return [SparseGradCallback(steps=3)] * ("warm-up" in name) + [GradDropCallback(config)]


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class Save(TrainerCallback):
    """In the middle of an epoch, and at an epoch's end."""

    steps = (6, 8)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step in self.steps


class Record(TrainerCallback):
    """What moved in each optimizer step, and where each micro-batch left a gradient."""

    def __init__(self):
        self.moved, self.gradients, self.epochs = [], [], []

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.before = trained(model)
        self.epochs.append(int(state.epoch or 0))
        assert state.global_step == len(self.moved)

    def on_substep_end(self, args, state, control, model, **kwargs):
        self.gradients.append((len(self.moved), self._gradients(model)))

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients.append((len(self.moved), self._gradients(model)))

    def on_step_end(self, args, state, control, model, **kwargs):
        self.moved.append({name: value != self.before[name] for name, value in trained(model).items()})

    def _gradients(self, model):
        return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def masked_names(model):
    """Name in the model to the name and the layer that the mask depends on."""
    own = {
        id(masked.parameter): (masked.name, masked.block)
        for layer in model.modules()
        if isinstance(layer, GradDropLayer)
        for masked in layer.masked_parameters()
    }
    if own:
        return {name: own[id(p)] for name, p in model.named_parameters() if id(p) in own}
    blocks = find_blocks(model)
    return {
        name: (name, block_of(name, blocks))
        for name, p in model.named_parameters()
        if p.requires_grad and block_of(name, blocks)
    }


def keeps(model, config, step, epoch, num_epochs=EPOCHS):
    """Name to the entries that the mask of a step keeps."""
    names = masked_names(model)
    masks = MaskSampler(config, list(dict.fromkeys(layer for _, layer in names.values())))
    masks.set_num_epochs(num_epochs)
    masks.set_epoch(epoch)
    masks.set_step(step)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    return {name: masks.mask(*names[name]).keep(shapes[name], torch.device("cpu")) for name in names}


def assert_moves_what_it_keeps(model, config, record, num_epochs=EPOCHS):
    for step, (epoch, moved) in enumerate(zip(record.epochs, record.moved, strict=True)):
        keep = keeps(model, config, step, epoch, num_epochs)
        assert keep
        for name, kept in keep.items():
            assert not (moved[name] & ~kept).any(), (step, name)
        assert share(moved, keep) >= 0.99 * share(keep, keep), step


def share(entries, names):
    return sum(int(entries[name].sum()) for name in names) / sum(entries[name].numel() for name in names)


def equal(one, two):
    assert one.keys() == two.keys()
    return all(torch.equal(one[name], two[name]) for name in one)


# The adapter, with the callback


@pytest.mark.parametrize("variant", often(VARIANTS, ["GradDrop", "GradDrop-Epoch-Toggle"]))
def test_resumed_run_is_the_uninterrupted_run_bit_for_bit(tmp_path, variant):
    def run(path, resume=None):
        model = graddrop(variant)
        trainer(model, path, [GradDropCallback(), Save()]).train(resume_from_checkpoint=resume)
        return trained(model)

    through = run(tmp_path / "through")
    assert all(value.any() for value in through.values())
    for step in Save.steps:
        assert equal(through, run(tmp_path / f"{step}", str(tmp_path / f"through/checkpoint-{step}"))), step


@pytest.mark.parametrize("variant", VARIANTS)
def test_masks_are_those_of_the_step_and_the_epoch_and_micro_batches_share_them(tmp_path, variant):
    model, record = graddrop(variant, frozen="hold"), Record()
    trainer(model, tmp_path, [record, GradDropCallback()]).train()
    assert record.epochs == [epoch for epoch in range(EPOCHS) for _ in range(STEPS_IN_EPOCH)]
    config = model.peft_config["default"]
    assert_moves_what_it_keeps(model, config, record)
    assert len(record.gradients) == 7 * EPOCHS
    for step, gradients in record.gradients:
        for name, kept in keeps(model, config, step, record.epochs[step]).items():
            assert not gradients[name][~kept].any(), (step, name)


@pytest.mark.parametrize("variant", ["GradDrop", "Anneal-GradDrop"])
def test_gradients_are_masked_and_momentum_moves_what_they_leave(tmp_path, variant):
    model, record = graddrop(variant), Record()
    trainer(model, tmp_path, [record, GradDropCallback()]).train()
    for step, gradients in record.gradients:
        for name, kept in keeps(model, model.peft_config["default"], step, record.epochs[step]).items():
            assert not gradients[name][~kept].any(), (step, name)
            assert gradients[name][kept].count_nonzero() >= 0.99 * kept.sum()
    assert share(record.moved[-1], record.moved[-1]) > 0.99


@pytest.mark.parametrize(
    ("variant", "rates", "moved"),
    [
        ("GradDrop", [0.2, 0.2, 0.2], None),
        ("Layer-GradDrop", [0.2, 0.2, 0.2], None),
        ("Anneal-GradDrop", [0.9, 0.45, 0.0], None),
        ("GradDrop-Epoch", [2 / 3, 1 / 3, 0.0], [1 / 3, 2 / 3, 1]),
        ("GradDrop-Epoch-Toggle", [2 / 3, 2 / 3, 2 / 3], [1 / 3, 2 / 3, 1]),
        ("GradFreeze-TopDown", [2 / 3, 1 / 3, 0.0], [1 / 3, 2 / 3, 1]),
    ],
)
def test_log_says_how_much_is_dropped_trains_and_has_moved(tmp_path, variant, rates, moved):
    counted = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            deltas = trained(model)
            counted.append(share({name: delta != 0 for name, delta in deltas.items()}, deltas))

    model = graddrop(variant)
    run = trainer(model, tmp_path, [Count(), GradDropCallback()])
    run.train()
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["graddrop_rate"] for entry in entries] == pytest.approx(rates)
    assert [entry["graddrop_moved"] for entry in entries] == pytest.approx(counted[STEPS_IN_EPOCH - 1 :: 4])
    if moved is not None:
        assert [entry["graddrop_moved"] for entry in entries] == pytest.approx(moved, abs=0.01)
    for epoch, entry in enumerate(entries):
        keep = keeps(model, model.peft_config["default"], STEPS_IN_EPOCH * (epoch + 1) - 1, epoch)
        assert entry["graddrop_active"] == pytest.approx(share(keep, keep), abs=0.01)


def test_epochs_are_those_of_a_run_of_max_steps(tmp_path):
    model, record = graddrop("GradDrop-Epoch"), Record()
    trainer(model, tmp_path, [record, GradDropCallback()], max_steps=10).train()
    assert record.epochs == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert_moves_what_it_keeps(model, model.peft_config["default"], record)


def test_part_of_an_epoch_counts_as_one(tmp_path):
    model, record = graddrop("GradFreeze-TopDown"), Record()
    trainer(model, tmp_path, [record, GradDropCallback()], num_train_epochs=1.5).train()
    assert record.epochs == [0, 0, 0, 0, 1, 1]
    assert_moves_what_it_keeps(model, model.peft_config["default"], record, num_epochs=2)


def test_number_of_epochs_in_conflict_with_the_configuration_is_refused_before_training(tmp_path):
    model = graddrop("GradDrop-Epoch", num_epochs=5)
    before, record = trained(model), Record()
    with pytest.raises(ValueError, match=r"`num_epochs` is 5 .* the run is 3"):
        trainer(model, tmp_path, [GradDropCallback(), record]).train()
    assert not record.epochs
    assert equal(before, trained(model))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(rows(28))


@pytest.mark.parametrize("variant", ["GradDrop", "Layer-GradDrop"])
def test_steps_are_announced_on_a_stream_too(tmp_path, variant):
    model, record = graddrop(variant, frozen="hold"), Record()
    settings = {"dataset": Stream(), "max_steps": 10, "gradient_accumulation_steps": 1}
    trainer(model, tmp_path, [record, GradDropCallback()], **settings).train()
    assert_moves_what_it_keeps(model, model.peft_config["default"], record, num_epochs=1)


@pytest.mark.parametrize("variant", ["GradDrop-Epoch", "GradFreeze-TopDown", "Anneal-GradDrop"])
def test_epochs_of_a_stream_are_refused_for_their_number_is_unknown(tmp_path, variant):
    """The Trainer counts a stream's epochs up to sys.maxsize: a share of 1/sys.maxsize would train."""
    with pytest.raises(ValueError, match="num_epochs"):
        trainer(graddrop(variant), tmp_path, [GradDropCallback()], dataset=Stream(), max_steps=6).train()


@pytest.mark.parametrize("variant", ["GradDrop-Epoch", "GradFreeze-TopDown", "Anneal-GradDrop"])
def test_epochs_of_the_configuration_divide_the_steps_of_a_stream(tmp_path, variant):
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            layer = next(m for m in kwargs["model"].modules() if isinstance(m, GradDropLayer))
            seen.append(layer.graddrop_sampler["default"].epoch)

    model = graddrop(variant, num_epochs=3)
    settings = {"dataset": Stream(), "max_steps": 9, "gradient_accumulation_steps": 1}
    trainer(model, tmp_path, [GradDropCallback(), Look()], **settings).train()
    assert seen == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_finished_run_that_is_resumed_does_nothing(tmp_path):
    model = graddrop("GradDrop-Epoch")
    run = trainer(model, tmp_path, [GradDropCallback()], save_strategy="epoch")
    run.train()
    before, steps = trained(model), run.state.global_step
    again = trainer(model, tmp_path, [GradDropCallback()])
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}"))
    assert again.state.global_step == steps
    assert equal(before, trained(model))


def test_two_callbacks_on_the_same_parameters_are_refused(tmp_path):
    callbacks = [GradDropCallback(GradDropConfig(seed=seed)) for seed in (0, 1)]
    with pytest.raises(ValueError, match="two `GradDropCallback`s mask the same parameters"):
        trainer(other("full"), tmp_path, callbacks).train()


BEST = {
    "save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3,
    "load_best_model_at_end": True, "metric_for_best_model": "loss",
    "greater_is_better": True,  # so that it is not the last one
}  # fmt: skip


def assert_is_best(run):
    losses = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    best = max(losses, key=losses.get)
    assert best != 12
    assert run.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert run.evaluate()["eval_loss"] == pytest.approx(losses[best], abs=1e-6)


def test_best_model_is_loaded_at_the_end(tmp_path):
    run = trainer(graddrop("GradDrop-Epoch"), tmp_path, [GradDropCallback()], **BEST)
    run.train()
    assert_is_best(run)


@pytest.mark.parametrize(
    ("variant", "reentrant"),
    [
        ("GradDrop", False),
        pytest.param("Layer-GradDrop", False, marks=pytest.mark.slow),
        ("Layer-GradDrop", True),
        pytest.param("GradDrop-Epoch", True, marks=pytest.mark.slow),
    ],
)
def test_gradient_checkpointing_changes_nothing(tmp_path, variant, reentrant):
    def run(**settings):
        model = graddrop(variant)
        trainer(model, tmp_path, [GradDropCallback()], num_train_epochs=2, **settings).train()
        return trained(model)

    plain = run()
    again = run(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert all(torch.allclose(plain[name], again[name], atol=1e-6) for name in plain)


@pytest.mark.parametrize("variant", ["GradDrop", "Layer-GradDrop"])
def test_masks_hold_under_bf16_autocast(tmp_path, variant):
    model, record = graddrop(variant, frozen="hold"), Record()
    trainer(model, tmp_path, [record, GradDropCallback()], bf16=True).train()
    assert_moves_what_it_keeps(model, model.peft_config["default"], record)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}


def test_second_run_on_the_same_model_has_masks_of_its_own(tmp_path):
    model = graddrop("GradDrop-Epoch")
    trainer(model, tmp_path, [GradDropCallback()]).train()
    record = Record()
    trainer(model, tmp_path, [record, GradDropCallback()], num_train_epochs=2).train()
    assert_moves_what_it_keeps(model, model.peft_config["default"], record, num_epochs=2)


# The adapter, without the callback


@pytest.mark.parametrize("variant", ["Anneal-GradDrop", "GradDrop-Epoch", "GradFreeze-TopDown"])
def test_variant_of_epochs_asks_for_the_callback_at_the_first_backward_pass(tmp_path, variant):
    record = Record()
    with pytest.raises(RuntimeError, match="GradDropCallback"):
        trainer(graddrop(variant, num_epochs=3), tmp_path, [record]).train()
    assert len(record.epochs) == 1
    assert not record.moved


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("GradDrop", {"frozen": "hold"}),
        ("Layer-GradDrop", {}),
        pytest.param("GradDrop", {}, marks=pytest.mark.slow),
        pytest.param("Layer-GradDrop", {"frozen": "hold"}, marks=pytest.mark.slow),
    ],
)
def test_nothing_called_draws_a_mask_for_every_optimizer_step(tmp_path, variant, settings):
    model, record = graddrop(variant, p=0.5, **settings), Record()
    run = trainer(model, tmp_path, [record], num_train_epochs=6)
    run.train()
    config = model.peft_config["default"]
    for step, gradients in record.gradients:
        for name, kept in keeps(model, config, step, 0).items():
            assert not gradients[name][~kept].any(), (step, name)
    if config.frozen == "hold":
        assert_moves_what_it_keeps(model, config, record)
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1


def test_nothing_called_after_a_run_with_the_callback_still_draws_a_mask_for_every_step(tmp_path):
    model = graddrop("GradDrop", p=0.5, frozen="hold")
    trainer(model, tmp_path, [GradDropCallback()], num_train_epochs=1).train()
    record = Record()
    trainer(model, tmp_path, [record], num_train_epochs=1).train()
    moved_in_all = {n: torch.stack([moved[n] for moved in record.moved]).any(0) for n in record.moved[0]}
    assert share(moved_in_all, moved_in_all) == pytest.approx(1 - 0.5**STEPS_IN_EPOCH, abs=0.02)


def test_variant_of_epochs_asks_for_the_callback_in_a_second_run_too(tmp_path):
    """Else it would go on with the mask of the last epoch, in which everything trains."""
    model = graddrop("GradDrop-Epoch")
    trainer(model, tmp_path, [GradDropCallback()]).train()
    with pytest.raises(RuntimeError, match="GradDropCallback"):
        trainer(model, tmp_path, num_train_epochs=1).train()


def test_task_head_trains_unmasked_and_embeddings_do_not_train(tmp_path):
    labelled = [{"input_ids": row["input_ids"], "labels": row["input_ids"][0] % 2} for row in rows(28)]
    config = GradDropConfig.from_variant("GradDrop-Epoch-Toggle", task_type="SEQ_CLS")
    model, record = get_peft_model(bert(), config), Record()
    trainer(model, tmp_path, [record, GradDropCallback()], dataset=labelled).train()
    assert_moves_what_it_keeps(model, config, record)
    head = set(trained(model)) - set(masked_names(model))
    assert len(head) == 2
    assert all("classifier" in name and moved[name].all() for moved in record.moved for name in head)


# Other models


EACH_ONCE = [
    ("full", "GradDrop"), ("lora", "Layer-GradDrop"), ("sparsegrad", "GradDrop-Epoch"),
    ("sparsegrad, warm-up", "GradDrop"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "variant"),
    often(list(itertools.product(OTHERS, ["GradDrop", "Layer-GradDrop", "GradDrop-Epoch"])), EACH_ONCE),
)
def test_masks_all_that_trains_in_the_blocks_of_another_model_and_nothing_else(tmp_path, name, variant):
    model, record = other(name), Record()
    settings = {**MASKED, "scale": None} if variant != "GradDrop-Epoch" else {}
    config = GradDropConfig.from_variant(variant, **settings)
    run = trainer(model, tmp_path, [*callbacks_for(name, config), record])
    run.train()
    assert_moves_what_it_keeps(model, config, record)
    unmasked = set(trained(model)) - set(masked_names(model))
    assert bool(unmasked) == (name == "full")
    assert all(moved[name].float().mean() > 0.95 for moved in record.moved for name in unmasked)
    assert all(entry["graddrop_moved"] > 0.2 for entry in run.state.log_history if "loss" in entry)


@pytest.mark.parametrize("name", OTHERS)
def test_resumed_run_of_another_model_is_the_uninterrupted_run_bit_for_bit(tmp_path, name):
    def run(path, resume=None):
        model, config = other(name), GradDropConfig.from_variant("GradDrop-Epoch-Toggle")
        trainer(model, path, [*callbacks_for(name, config), Save()]).train(resume_from_checkpoint=resume)
        return trained(model)

    through = run(tmp_path / "through")
    for step in Save.steps:
        assert equal(through, run(tmp_path / f"{step}", str(tmp_path / f"through/checkpoint-{step}"))), step


@pytest.mark.parametrize("name", OTHERS)
def test_training_leaves_no_masks_behind(tmp_path, name):
    model = other(name)
    trainer(model, tmp_path, callbacks_for(name, GradDropConfig(**MASKED)), num_train_epochs=1).train()
    assert not any(p._backward_hooks for p in model.parameters())
    record = Record()
    trainer(model, tmp_path, [record], num_train_epochs=1).train()
    assert all(share(moved, moved) > 0.99 for moved in record.moved)


def test_loss_logged_after_training_is_no_error(tmp_path):
    run = trainer(other("lora"), tmp_path, [GradDropCallback(GradDropConfig(**MASKED))], num_train_epochs=1)
    run.train()
    run.log({"loss": 1.0})


class Interrupted(Exception):
    pass


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise Interrupted


def interrupted(tmp_path, model, config) -> GradDropCallback:
    callback = GradDropCallback(config)
    with pytest.raises(Interrupted):
        trainer(model, tmp_path, [callback, Interrupt()]).train()
    return callback


@pytest.mark.parametrize("how", ["the same callback", "another callback"])
def test_interrupted_run_leaves_no_masks_to_the_next(tmp_path, how):
    model, config, record = other("full"), GradDropConfig(**MASKED), Record()
    callback = interrupted(tmp_path, model, config)
    again = callback if how == "the same callback" else GradDropCallback(config)
    trainer(model, tmp_path, [again, record], num_train_epochs=1).train()
    assert_moves_what_it_keeps(model, config, record, num_epochs=1)


def test_masks_of_an_interrupted_run_are_refused_by_a_run_without_a_callback(tmp_path):
    """Nobody tells a callback that its run is over; a step by another optimizer does."""
    model, record = other("full"), Record()
    callback = interrupted(tmp_path, model, GradDropConfig(**MASKED))
    with pytest.raises(RuntimeError, match="masked for another run"):
        trainer(model, tmp_path, num_train_epochs=1).train()
    callback.graddrop.remove()
    trainer(model, tmp_path, [record], num_train_epochs=1).train()
    assert all(share(moved, moved) > 0.99 for moved in record.moved)


def test_announcements_of_an_interrupted_run_are_refused_by_a_run_without_a_callback(tmp_path):
    model = graddrop("Layer-GradDrop")
    interrupted(tmp_path, model, None)
    with pytest.raises(RuntimeError, match="masked for another run"):
        trainer(model, tmp_path, num_train_epochs=1).train()


def test_masks_the_values_of_a_dynamic_support(tmp_path):
    model, record = adapted(support="dynamic", density=0.3), Record()
    config = GradDropConfig(**MASKED)
    run = trainer(model, tmp_path, [GradDropCallback(config), record])
    run.optimizer = create_sparsegrad_optimizer(model, lr=1e-2)
    run.train()
    for step, moved in enumerate(record.moved):
        keep = keeps(model, config, step, epoch=0)
        assert 0 < share(moved, keep) <= share(keep, keep)
        assert not any((moved[name] & ~kept).any() for name, kept in keep.items())


def test_best_model_of_a_model_in_full_is_loaded_at_the_end(tmp_path):
    run = trainer(other("full"), tmp_path, [GradDropCallback(GradDropConfig(**MASKED))], **BEST)
    run.train()
    assert_is_best(run)


def test_adapter_saved_by_the_trainer_gives_equal_logits_in_a_fresh_process(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    variants = ["GradDrop", "Layer-GradDrop", "GradDrop-Epoch-Toggle"]
    models = {variant: (graddrop(variant), [GradDropCallback()]) for variant in variants}
    models |= {name: (other(name), callbacks_for(name, GradDropConfig(**MASKED))) for name in OTHERS}
    for name, (model, callbacks) in models.items():
        run = trainer(model, tmp_path / "run", callbacks, num_train_epochs=2)
        run.train()
        run.save_model(str(tmp_path / name))
        torch.save(logits(model), tmp_path / name / "logits")
    done = run_program("-c", RELOAD, tmp_path, json.dumps(list(models)))
    assert done.returncode == 0, done.stderr[-3000:]


RELOAD = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from peft import PeftModel
from tiny import logits
from transformers import AutoModelForCausalLM
import peft_sparsegrad

path = Path(sys.argv[1])
for name in json.loads(sys.argv[2]):
    base = AutoModelForCausalLM.from_pretrained(path / (name if name == "full" else "base"))
    model = base if name == "full" else PeftModel.from_pretrained(base, path / name)
    assert torch.equal(logits(model), torch.load(path / name / "logits")), name
"""


# Loops of one's own


def model_and_masks(kind, variant, **overrides):
    """A model, with the adapter or else trained in full, with its configuration and its `GradDrop`."""
    config = GradDropConfig.from_variant(variant, **overrides)
    model = get_peft_model(llama(), config) if kind == "adapter" else llama()
    return model, config, GradDrop(model, None if kind == "adapter" else config)


def moved_by(model, step):
    before = trained(model)
    step()
    return {name: value != before[name] for name, value in trained(model).items()}


def assert_moved(moved, keep):
    assert not any((moved[name] & ~kept).any() for name, kept in keep.items())
    assert share(moved, keep) >= 0.99 * share(keep, keep)


KINDS = pytest.mark.parametrize("kind", ["adapter", "full"])


@KINDS
@pytest.mark.parametrize("variant", ["GradDrop-Epoch", "GradDrop-Epoch-Toggle", "GradFreeze-TopDown"])
def test_two_lines_in_a_loop_of_ones_own(kind, variant):
    model, config, graddrop = model_and_masks(kind, variant, num_epochs=3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
    for epoch in range(3):
        graddrop.set_epoch(epoch)
        for step in range(2):
            model(**batch(step)).loss.backward()
            moved = moved_by(model, optimizer.step)
            optimizer.zero_grad()
            assert_moved(moved, keeps(model, config, 0, epoch))


@KINDS
@pytest.mark.parametrize("settings", [("GradDrop", MASKED), ("Layer-GradDrop", {"p": 0.5, "seed": 4})])
def test_step_that_the_gradient_scaler_skips_does_not_advance_the_mask(kind, settings):
    model, config, graddrop = model_and_masks(kind, settings[0], **settings[1])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38, backoff_factor=1e-36)
    for step in [None, 0, 1]:  # the first overflows
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch()).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        moved = moved_by(model, lambda: scaler.step(optimizer))
        scaler.update()
        optimizer.zero_grad()
        if step is None:
            assert not any(entries.any() for entries in moved.values())
        else:
            assert_moved(moved, keeps(model, config, step, 0, num_epochs=1))
        assert graddrop.samplers[0].step == (step or 0)


@KINDS
def test_gradient_scaler_takes_a_step_in_which_all_layers_are_masked(kind):
    model, config, _ = model_and_masks(kind, "Layer-GradDrop", p=0.99)
    assert not any(kept.any() for kept in keeps(model, config, 0, 0, num_epochs=1).values())
    blocks = [p for name, p in model.named_parameters() if p.requires_grad and "layers" in name]
    optimizer = torch.optim.AdamW(blocks, lr=1e-3)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(**batch()).loss).backward()
    moved = moved_by(model, lambda: scaler.step(optimizer))
    scaler.update()
    assert not any(entries.any() for entries in moved.values())


@KINDS
@pytest.mark.parametrize("settings", [("GradDrop", MASKED), ("Layer-GradDrop", {"p": 0.5, "seed": 4})])
def test_accelerate_with_accumulation_draws_one_mask_per_optimizer_step(kind, settings):
    AcceleratorState._reset_state(True)
    model, config, _ = model_and_masks(kind, settings[0], **settings[1])
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loader = torch.utils.data.DataLoader([{k: v[0] for k, v in batch(n).items()} for n in range(12)], batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for number, inputs in enumerate(loader):
        with accelerator.accumulate(model):
            accelerator.backward(model(**inputs).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            moved = moved_by(model, optimizer.step)
            optimizer.zero_grad()
        if number % 2:
            assert_moved(moved, keeps(model, config, number // 2, 0, num_epochs=1))
        else:
            assert not any(entries.any() for entries in moved.values())
