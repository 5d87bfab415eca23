"""Time and memory of a training step, side by side for every contender.

Every method trains the same linear layers (the defaults of SparseGrad: both MLP layers of BERT, `up_proj` and
`down_proj` of LLaMA) of the same model at the same density, nothing else trains, and the embeddings' output requires a
gradient, so that every backward pass goes down to the first layer. A step is a forward and a backward pass, the
optimizer's step and `zero_grad`. The frozen model, forward and backward, is the floor.

In `half padding` half of every sequence is padding, which gets no gradient: the rows of zeros that the sparse-by-dense
product of the paper's section 3.3 leaves out.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

import torch

from experiments.memory import peak_of, saved_storages, storages

from . import contenders as c
from .contenders import Contender, build_contender
from .models import Shape, make_batch
from .timing import Stopwatch

PADDED = (c.LORA, c.DYNAMIC, c.DYNAMIC_SD)


def benchmark_step(
    shape: Shape, device: torch.device, rounds: int, density: float, names: Iterable[str]
) -> dict[str, Any]:
    """Measure the contenders `names` on one shape.

    Returns:
        `"full batch"` and, where the contenders of `PADDED` are among them, `"half padding"`: for each contender the
        results of `measure_memory` and `compare_times`.
    """
    contenders = [build_contender(name, shape, device, density) for name in names]
    result = {"full batch": measure(contenders, make_batch(shape, device, padded=False), rounds)}
    padded = [contender for contender in contenders if contender.name in PADDED]
    if len(padded) == len(PADDED):
        result["half padding"] = measure(padded, make_batch(shape, device, padded=True), rounds)
    return result


def measure(contenders: list[Contender], batch: dict[str, torch.Tensor], rounds: int) -> dict[str, dict[str, Any]]:
    """Memory and times of the contenders on one batch, by name; LoRA must be among them."""
    memory = {contender.name: measure_memory(contender, batch) for contender in contenders}
    times = compare_times(time_rounds(contenders, batch, rounds))
    return {
        contender.name: {"trained": contender.trained, **memory[contender.name], **times[contender.name]}
        for contender in contenders
    }


def measure_memory(contender: Contender, batch: dict[str, torch.Tensor]) -> dict[str, int]:
    """Bytes kept for the backward pass, resident between steps, and both with temporaries at the step's peak."""
    contender.step(batch)  # the optimizer makes its state in the first step
    kept, standing = saved_storages(lambda: contender.forward(batch))
    resident = sum({**standing, **storages(contender.resident())}.values())
    peak = resident + peak_of(lambda: contender.step(batch), batch["input_ids"].device)
    return {"kept_bytes": sum(kept.values()), "resident_bytes": resident, "peak_bytes": peak}


def time_rounds(
    contenders: list[Contender], batch: dict[str, torch.Tensor], rounds: int
) -> dict[str, list[Stopwatch]]:
    """Time each step, the contenders taking turns; `measure_memory` has run the first steps, which are slower."""
    device = batch["input_ids"].device
    watches: dict[str, list[Stopwatch]] = {contender.name: [] for contender in contenders}
    for contender in contenders * rounds:
        with Stopwatch(device) as watch:
            contender.step(batch)
        watches[contender.name].append(watch)
    return watches


def compare_times(watches: dict[str, list[Stopwatch]]) -> dict[str, dict[str, Any]]:
    """Seconds, and the ratios to what LoRA and SparseGrad took in the same round."""
    seconds = {name: [watch.seconds for watch in timed] for name, timed in watches.items()}
    cpu_seconds = {name: [watch.cpu_seconds for watch in timed] for name, timed in watches.items()}
    return {
        name: {
            "median_seconds": statistics.median(seconds[name]),
            "seconds": seconds[name],
            "cpu_seconds": cpu_seconds[name],
            "to_lora": ratios(seconds[name], seconds[c.LORA]),
            "cpu_to_lora": ratios(cpu_seconds[name], cpu_seconds[c.LORA]),
            "to_sparsegrad": ratios(seconds[name], seconds[c.STATIC]) if c.STATIC in seconds else None,
        }
        for name in watches
    }


def ratios(times: list[float], others: list[float]) -> dict[str, float]:
    """Least, median and greatest ratio of two lists of times, taken round by round."""
    quotients = [time / other for time, other in zip(times, others, strict=True)]
    return {"min": min(quotients), "median": statistics.median(quotients), "max": max(quotients)}
