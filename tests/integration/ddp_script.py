"""Started by torchrun: train on fixed global batches, split over the ranks, and save what came out.

torchrun --nproc_per_node=2 ddp_script.py OUT
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import adapted, rows
from transformers import Trainer, TrainingArguments

from peft_sparsegrad import SparseGradCallback

LEARNING_RATE = 1e-3


def make(how: str):
    """A model whose supports are renewed at the third and at the sixth step after the warm-up, or not at all."""
    return adapted(warmup_steps=4, density=0.2, renewal_steps=3 if how in ("renewing", "resumed") else 25)


def rank_and_world() -> tuple[int, int]:
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def trainer(how: str, folder: Path, **settings: Any) -> dict[str, Any]:
    arguments = TrainingArguments(
        str(folder), max_steps=10, per_device_train_batch_size=8 // rank_and_world()[1], learning_rate=LEARNING_RATE,
        report_to=[], disable_tqdm=True, use_cpu=True, seed=3, **{"save_strategy": "no", **settings},
    )  # fmt: skip
    model = make(how)
    callbacks = [SparseGradCallback(steps=4)] if how in ("callback", "resumed") else []
    run = Trainer(model, arguments, train_dataset=rows(64), callbacks=callbacks)
    run.train(resume_from_checkpoint=str(folder / "checkpoint-5") if (folder / "checkpoint-5").exists() else None)
    return results(model)


def resumed(how: str, folder: Path) -> dict[str, Any]:
    """A run that is resumed between two renewals, and beside it the run that was not interrupted."""
    through = trainer(how, folder, save_strategy="steps", save_steps=5)
    return {**trainer(how, folder), "through": through["state"]}


def results(model) -> dict[str, Any]:
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "sparsegrad_adapter")}
    return {
        "deltas": {name: layer.get_delta_weight("default") for name, layer in layers.items()},
        "supports": {name: layer.adapter("default").indices for name, layer in layers.items()},
        "state": {key: value for key, value in model.state_dict().items() if "sparsegrad_" in key},
    }


def end_distributed():
    """End the process with everything saved, without destructors.

    That of DDP joins gloo's threads while it holds the interpreter's lock, which one of them may be waiting for; and a
    thread that still runs when the interpreter ends can abort it.
    """
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


RUNS = {
    **{f"trainer {how}": (trainer, how) for how in ("observed", "callback", "renewing")},
    "trainer resumed": (resumed, "resumed"),
}


def run(name: str, folder: Path) -> dict[str, Any]:
    function, how = RUNS[name]
    return function(how, folder / name.replace(" ", "_"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    out = Path(sys.argv[1])
    torch.save({name: run(name, out) for name in RUNS}, out / f"rank{dist.get_rank()}.pt")
    end_distributed()
