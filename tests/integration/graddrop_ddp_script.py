"""Started by torchrun: train every case on fixed global batches, split over the ranks, and save what came out."""

import contextlib
import os
import sys

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from tiny import batch, llama, rows
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_sparsegrad import GradDrop, GradDropCallback, GradDropConfig, GradDropLayer

LEARNING_RATE, EPOCHS, STEPS_IN_EPOCH = 1e-3, 2, 4
LAYERS = {"p": 0.5, "seed": 19}  # in some steps all layers are masked, in others none
CASES = {
    "loop, GradDrop, SGD": ("loop", "GradDrop", {}, "SGD"),
    "loop, Layer-GradDrop, SGD": ("loop", "Layer-GradDrop", LAYERS, "SGD"),
    "loop, Layer-GradDrop, not held": ("loop", "Layer-GradDrop", {**LAYERS, "frozen": "gradient"}, "SGD"),
    "loop, Layer-GradDrop, micro-batches": ("loop", "Layer-GradDrop", LAYERS, "AdamW", {"micro_batches": 2}),
    "loop, Layer-GradDrop, bucket views": (
        "loop", "Layer-GradDrop", LAYERS, "AdamW", {"gradient_as_bucket_view": True},
    ),
    "loop, Layer-GradDrop, static graph": ("loop", "Layer-GradDrop", LAYERS, "AdamW", {"static_graph": True}),
    "loop, GradDrop-Epoch, SGD": ("loop", "GradDrop-Epoch", {}, "SGD"),
    "loop, LoRA layers": ("loop", "Layer-GradDrop", LAYERS, "AdamW", {"lora": True}),
    "loop, LoRA layers, masks put on the DDP module": (
        "loop", "Layer-GradDrop", LAYERS, "AdamW", {"lora": True, "on_wrapper": True},
    ),
    "trainer, GradDrop, SGD": ("trainer", "GradDrop", {}, "sgd"),
    "trainer, GradDrop, AdamW": ("trainer", "GradDrop", {}, "adamw_torch"),
    "trainer, Layer-GradDrop, SGD": ("trainer", "Layer-GradDrop", LAYERS, "sgd"),
    "trainer, Layer-GradDrop, AdamW": ("trainer", "Layer-GradDrop", LAYERS, "adamw_torch"),
    "trainer, Layer-GradDrop, as the Trainer wraps it": (
        "trainer", "Layer-GradDrop", LAYERS, "adamw_torch", {"find_unused": None},
    ),
    "trainer, GradDrop-Epoch, AdamW": ("trainer", "GradDrop-Epoch", {}, "adamw_torch"),
    "trainer, LoRA": ("trainer", "GradDrop", {"p": 0.5, "frozen": "hold"}, "adamw_torch", {"lora": True}),
    "trainer, LoRA layers": ("trainer", "Layer-GradDrop", LAYERS, "sgd", {"lora": True}),
}  # fmt: skip


class Watch:
    """Counts the entries that moved where they were to stay, and the layers in which nothing trained."""

    def __init__(self, find):
        self.find, self.escaped, self.steps, self.shares, self.masked_layers = find, 0, [], [], 0

    def before_step(self):
        self.before = [
            (parameter, parameter.detach().clone(), masks.mask(name, layer).keep(parameter.shape, parameter.device))
            for parameter, masks, name, layer in self.find()
        ]
        self.steps.append(next(iter(self.find())).sampler.progress.step)

    def after_step(self):
        moved = sum(int((parameter != before).sum()) for parameter, before, _ in self.before)
        kept = sum(int(keep.sum()) for *_, keep in self.before)
        self.escaped += sum(int(((parameter != before) & ~keep).sum()) for parameter, before, keep in self.before)
        self.shares.append((moved, kept))
        self.masked_layers += kept == 0

    def results(self):
        return {name: getattr(self, name) for name in ("escaped", "steps", "shares", "masked_layers")}


def adapter_parameters(model):
    return [masked for m in model.modules() if isinstance(m, GradDropLayer) for masked in m.masked_parameters()]


def built(config, lora):
    return get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear") if lora else config)


def loop(variant, overrides, optimizer, lora=False, on_wrapper=False, micro_batches=1, **ddp):
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    config = GradDropConfig.from_variant(variant, **overrides)
    model = built(config, lora)
    wrapped = DistributedDataParallel(model, **ddp) if world > 1 else model
    graddrop = GradDrop(wrapped if on_wrapper else model, config if lora else None, num_epochs=EPOCHS)
    watch = Watch(graddrop.masked_parameters if lora else lambda: adapter_parameters(model))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = getattr(torch.optim, optimizer)(trained, lr=LEARNING_RATE, weight_decay=0.01)
    for epoch in range(EPOCHS):
        graddrop.set_epoch(epoch)
        for step in range(STEPS_IN_EPOCH):
            for micro_batch in range(micro_batches):
                last = micro_batch == micro_batches - 1
                ids = batch(step + 10 * micro_batch)["input_ids"][rank::world]  # without padding: equal shares
                with contextlib.nullcontext() if last or world == 1 else wrapped.no_sync():
                    (wrapped(input_ids=ids, labels=ids).loss / micro_batches).backward()
            watch.before_step()
            optimizer.step()
            optimizer.zero_grad()
            watch.after_step()
    graddrop.remove()
    return model, watch


class WatchSteps(TrainerCallback):
    def __init__(self, find):
        self.watch = Watch(find)

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.watch.before_step()

    def on_step_end(self, *args, **kwargs):
        self.watch.after_step()


def trainer(variant, overrides, optimizer, lora=False, find_unused=False):
    world = int(os.environ.get("WORLD_SIZE", "1"))
    config = GradDropConfig.from_variant(variant, **overrides)
    model, callback = built(config, lora), GradDropCallback(config if lora else None)
    arguments = TrainingArguments(
        sys.argv[1] + ".dir" if __name__ == "__main__" else "unused", num_train_epochs=EPOCHS, save_strategy="no",
        per_device_train_batch_size=8 // world, learning_rate=LEARNING_RATE, optim=optimizer, report_to=[],
        disable_tqdm=True, use_cpu=True, seed=3, weight_decay=0.01, ddp_find_unused_parameters=find_unused,
    )  # fmt: skip
    steps = WatchSteps(lambda: callback.graddrop.masked_parameters() if lora else adapter_parameters(model))
    Trainer(model, arguments, train_dataset=rows(8 * STEPS_IN_EPOCH), callbacks=[callback, steps]).train()
    return model, steps.watch


def run(case):
    """What one case comes to: the trained parameters, and what a `Watch` saw."""
    kind, variant, overrides, optimizer, *settings = CASES[case]
    model, watch = {"loop": loop, "trainer": trainer}[kind](variant, overrides, optimizer, **dict(*settings))
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return {"trained": trained, **watch.results()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.save({case: run(case) for case in CASES}, f"{sys.argv[1]}.{dist.get_rank()}")
    dist.destroy_process_group()
