"""Training on fixed global batches, split over the ranks where there are several."""

import os
from pathlib import Path
from typing import Any

from tiny import adapted, rows
from transformers import Trainer, TrainingArguments

from peft_sparsegrad import SparseGradCallback

LEARNING_RATE = 1e-3


def make(how: str):
    """A model whose supports are renewed at the third and at the sixth step after the warm-up, or not at all.

    Its warm-up of 4 passes is shortened to 2, a quarter of the ten steps.
    """
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


RUNS = {
    **{f"trainer {how}": (trainer, how) for how in ("observed", "callback", "renewing")},
    "trainer resumed": (resumed, "resumed"),
}


def run(name: str, folder: Path) -> dict[str, Any]:
    function, how = RUNS[name]
    return function(how, folder / name.replace(" ", "_"))


def run_all(folder: str, names: list[str]) -> dict[str, dict[str, Any]]:
    return {name: run(name, Path(folder)) for name in names}
