"""Started by torchrun: train on a fixed global batch, split over the ranks, and save what came out."""

import os
import sys

import torch
import torch.distributed as dist
from tiny import adapted, batch, rows
from torch.nn.parallel import DistributedDataParallel

from peft_sparsegrad import SparseGradCallback, warmup

LEARNING_RATE = 1e-3


def make(how: str):
    """A model; `how="renewing"` renews its supports at the third and at the sixth step after the warm-up."""
    return adapted(warmup_steps=4, density=0.2, renewal_steps=3 if how == "renewing" else 25)


def loop(how: str, out: str) -> None:
    """A hand-written loop: DDP averages the gradients of equal shares of each batch."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        dist.init_process_group("gloo")
    model = make(how)

    def share(step):
        return {key: value[rank::world] for key, value in full_batch(step).items()}

    if how == "explicit":
        warmup(model, [share(step) for step in range(4)], progress=False)
    wrapped = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    for step in range(10):
        wrapped(**share(step % 4)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save(model, out)
    end_distributed()


def full_batch(step):
    data = batch(step)
    return {"input_ids": data["input_ids"], "labels": data["input_ids"]}  # no padding: equal shares weigh the same


def trainer(how: str, out: str) -> None:
    from transformers import Trainer, TrainingArguments

    world = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = TrainingArguments(
        out + ".dir", max_steps=10, per_device_train_batch_size=8 // world, learning_rate=LEARNING_RATE,
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, seed=3,
    )  # fmt: skip
    model = make(how)
    callbacks = [SparseGradCallback(steps=4)] if how == "callback" else []
    Trainer(model, arguments, train_dataset=rows(64), callbacks=callbacks).train()
    save(model, out)
    end_distributed()


def save(model, out):
    rank = dist.get_rank() if dist.is_initialized() else 0
    deltas = {
        name: layer.get_delta_weight("default")
        for name, layer in model.named_modules()
        if hasattr(layer, "sparsegrad_adapter")
    }
    supports = {
        name: layer.adapter("default").indices
        for name, layer in model.named_modules()
        if hasattr(layer, "sparsegrad_adapter")
    }
    state = {key: value for key, value in model.state_dict().items() if "sparsegrad_" in key}
    torch.save({"deltas": deltas, "supports": supports, "state": state}, f"{out}.{rank}")


def end_distributed():
    """End the process with everything saved, without destructors.

    That of DDP joins gloo's threads while it holds the interpreter's lock, which one of them may be waiting for; and a
    thread that still runs when the interpreter ends can abort it.
    """
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush()
        os._exit(0)


RUNS = {"loop": loop, "trainer": trainer}

if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, how, out = sys.argv[1:]
    RUNS[kind](how, out)
