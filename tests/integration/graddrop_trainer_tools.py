"""Trainer runs with GradDrop, a record of what moves in them, and the masks to hold it to."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import adapted, llama, rows
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_sparsegrad import GradDropCallback, GradDropConfig, GradDropLayer, SparseGradCallback
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
    masks.progress.set_step(step)
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
