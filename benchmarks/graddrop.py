"""Time that gradient masks cost and that skipping whole layers saves, against plain fine-tuning of the same modules.

Everything inside the transformer blocks trains with AdamW: the weights themselves in `full`, deltas on them in every
other contender. `graddrop-off` masks nothing, so what it takes more than `full` is the cost of the deltas, and what
the element-wise variants take more than it is the cost of the masks. Epoch variants are in the first of three epochs,
annealed ones too, at p = 0.9. Only in the frozen model does the embeddings' output require a gradient: there the
backward pass goes down to the first layer, elsewhere as far as anything trains.

AdamW is the fused one, the Trainer's default: the other one's square roots take torch eight times as long on a CPU
where there are zeros between the second moments, as the epoch variants leave them.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from experiments.methods import METHODS
from peft_sparsegrad import GradDrop
from peft_sparsegrad.graddrop import VARIANTS
from peft_sparsegrad.graddrop.blocks import find_blocks
from peft_sparsegrad.graddrop.targets import default_targets

from .contenders import FROZEN, FULL, LEARNING_RATE, Contender
from .models import Shape, build_model, make_batch
from .step import measure_memory, ratios, time_rounds

OFF = "graddrop-off"
ELEMENTS = ("graddrop", "graddrop-epoch")
LAYERS = ("layer-graddrop", "anneal-layer-graddrop", "gradfreeze-topdown")
CONTENDERS = (FROZEN, FULL, OFF, *ELEMENTS, *LAYERS)
NUM_EPOCHS = 3


def benchmark_graddrop(shape: Shape, device: torch.device, rounds: int) -> dict[str, dict[str, Any]]:
    """Time, memory and adapter bytes of the contenders on one shape, by name.

    Returns:
        For each contender what `measure_memory` returns; `median_seconds`; `to_full`, `to_off`: ratios, taken round by
        round, to `full` and `graddrop-off`; `skipped`: share of the entries that did not train, on average;
        `to_proportion`: ratio to what the step would take if the skipped share of what training costs were saved
        exactly.
    """
    contenders = [_build(name, shape, device) for name in CONTENDERS]
    batch = make_batch(shape, device, padded=False)
    memory = {contender.name: measure_memory(contender, batch) for contender in contenders}
    watches = time_rounds(contenders, batch, rounds)
    seconds = {name: [watch.seconds for watch in timed] for name, timed in watches.items()}
    training = 1 - ratios(seconds[FROZEN], seconds[FULL])["median"]
    result = {}
    for contender in contenders:
        skipped = _skipped(contender, rounds)
        own = seconds[contender.name]
        expected = [full * (1 - share * training) for full, share in zip(seconds[FULL], skipped, strict=True)]
        result[contender.name] = {
            "trained": contender.trained,
            **memory[contender.name],
            "median_seconds": statistics.median(own),
            "to_full": ratios(own, seconds[FULL]),
            "to_off": ratios(own, seconds[OFF]),
            "skipped": statistics.fmean(skipped),
            "to_proportion": ratios(own, expected),
        }
    return result


def _build(name: str, shape: Shape, device: torch.device) -> Contender:
    model = build_model(shape, device)
    if name == FROZEN:
        return Contender(name, model.requires_grad_(False), None)
    model.disable_input_require_grads()  # pyright: ignore[reportCallIssue]
    targets = default_targets(model, find_blocks(model), ()) if name == FULL else None
    model = METHODS[name].attach(model, targets, 1.0)
    if name != FULL:
        GradDrop(model, num_epochs=NUM_EPOCHS).set_epoch(0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Contender(name, model, torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True))


def _skipped(contender: Contender, rounds: int) -> list[float]:
    """Share of the entries that each timed step left out; what is masked element by element is not left out."""
    if contender.name not in LAYERS:
        return [float(contender.name == FROZEN)] * rounds
    graddrop = GradDrop(contender.model)
    last = graddrop.samplers[0].progress.step
    skipped = []
    for step in range(last - rounds + 1, last + 1):
        graddrop.set_step(step)
        skipped.append(1 - graddrop.report()["active"])
    return skipped


def adapter_bytes(shape: Shape, device: torch.device) -> dict[str, dict[str, Any]]:
    """Bytes of the adapter file of every variant after each of `NUM_EPOCHS` epochs of two steps, by name.

    Returns:
        `after_epoch`: the bytes; `entries`: of the deltas; `largest_1%`: bytes with `save_density=0.01` at the end.
    """
    batch = make_batch(shape, device, padded=False)
    return {name.lower(): _bytes_of(name, shape, device, batch) for name in VARIANTS}


def _bytes_of(name: str, shape: Shape, device: torch.device, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    contender = _build(name.lower(), shape, device)
    model, sizes = contender.model, []
    assert isinstance(model, PeftModel)
    graddrop = GradDrop(model, num_epochs=NUM_EPOCHS)
    for epoch in range(NUM_EPOCHS):
        graddrop.set_epoch(epoch)
        for _ in range(2):
            contender.step(batch)
        sizes.append(_file_bytes(model))
    config: Any = model.peft_config["default"]
    config.save_density = 0.01
    return {"after_epoch": sizes, "entries": contender.trained, "largest_1%": _file_bytes(model)}


def _file_bytes(model: PeftModel) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return Path(folder, "adapter_model.safetensors").stat().st_size
