"""What gradient masks cost, and what skipping whole layers saves, against plain fine-tuning of the same modules.

Everything inside the transformer blocks trains with AdamW: the weights themselves in `full`, deltas on them in every
other contender. `graddrop-off` masks nothing, so what it takes more than `full` is the cost of the deltas, and what
the element-wise variants take more than it is the cost of the masks. Epoch variants are in the first of three epochs,
annealed ones too, at p = 0.9. Layers are drawn anew in every round, so times are added up over all rounds.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from peft_sparsegrad import GradDrop
from peft_sparsegrad.graddrop.blocks import find_blocks
from peft_sparsegrad.graddrop.targets import default_targets
from peft_sparsegrad.methods import METHODS

from .contenders import FROZEN, FULL, LEARNING_RATE, Contender
from .models import Shape, build_model, make_batch
from .step import measure_memory, time_rounds

OFF = "graddrop-off"
ELEMENTS = ("graddrop", "graddrop-epoch")
LAYERS = ("layer-graddrop", "anneal-layer-graddrop", "gradfreeze-topdown")
CONTENDERS = (FROZEN, FULL, OFF, *ELEMENTS, *LAYERS)
NUM_EPOCHS = 3


def benchmark_graddrop(shape: Shape, device: torch.device, rounds: int) -> dict[str, dict[str, Any]]:
    """Time, memory and adapter bytes of the contenders on one shape, by name.

    Returns:
        For each contender what `measure_memory` returns; `to_full`, `to_off`: its seconds over all rounds divided by
        those of `full` and of `graddrop-off`; `skipped`: share of the entries that did not train, on average;
        `in_proportion`: `to_full` if the skipped share of what training costs were saved exactly; `adapter_bytes`.
    """
    contenders = [_build(name, shape, device) for name in CONTENDERS]
    batch = make_batch(shape, device, padded=False)
    memory = {contender.name: measure_memory(contender, batch) for contender in contenders}
    watches = time_rounds(contenders, batch, rounds)
    seconds = {name: sum(watch.seconds for watch in timed) for name, timed in watches.items()}
    skipped = {contender.name: _skipped(contender, rounds) for contender in contenders}
    training = 1 - seconds[FROZEN] / seconds[FULL]
    return {
        contender.name: {
            "trained": contender.trained,
            **memory[contender.name],
            "seconds": seconds[contender.name] / rounds,
            "to_full": seconds[contender.name] / seconds[FULL],
            "to_off": seconds[contender.name] / seconds[OFF],
            "skipped": skipped[contender.name],
            "in_proportion": 1 - skipped[contender.name] * training,
            "adapter_bytes": _adapter_bytes(contender),
        }
        for contender in contenders
    }


def _build(name: str, shape: Shape, device: torch.device) -> Contender:
    model = build_model(shape, device)
    if name == FROZEN:
        return Contender(name, model.requires_grad_(False), None)
    targets = default_targets(model, find_blocks(model)) if name == FULL else None
    model = METHODS[name].attach(model, targets, 1.0)
    if name != FULL:
        GradDrop(model, num_epochs=NUM_EPOCHS).set_epoch(0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Contender(name, model, torch.optim.AdamW(trained, lr=LEARNING_RATE))


def _skipped(contender: Contender, rounds: int) -> float:
    """Share of the entries that the timed steps left out; what is masked element by element is not left out."""
    if contender.name not in LAYERS:
        return float(contender.name == FROZEN)
    graddrop = GradDrop(contender.model)
    last = graddrop.masks[0].step
    active = 0.0
    for step in range(last - rounds + 1, last + 1):
        graddrop.set_step(step)
        active += graddrop.report()["active"]
    return 1 - active / rounds


def _adapter_bytes(contender: Contender) -> int | None:
    if not isinstance(contender.model, PeftModel):
        return None
    with tempfile.TemporaryDirectory() as folder:
        contender.model.save_pretrained(folder)
        return Path(folder, "adapter_model.safetensors").stat().st_size
