"""Command line of the benchmarks: measures, writes JSON, prints tables."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from experiments.environment import describe_environment
from experiments.memory import keep_freed_memory

from .contenders import CONTENDERS, NAMED, SWEEP, TO_CHECKPOINT, TO_COMPILE, TWO_WAYS
from .graddrop import adapter_bytes, benchmark_graddrop
from .models import SHAPES, dtype_on
from .step import benchmark_step
from .targets import targets_of
from .warmup import benchmark_warmup

CONTENDERS_OF = {
    "all": CONTENDERS,
    "variants": NAMED,
    "two-ways": TWO_WAYS,
    "widths": SWEEP,
    "compiled": TO_COMPILE,
    "checkpointed": TO_CHECKPOINT,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Benchmarks of SparseGrad and GradDrop.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: larger models, in bfloat16")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; one is the least noisy (default: 1)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each method (default: 5)")
    parser.add_argument("--only", choices=("step", "warmup", "graddrop"), help="run one part; default: all")
    parser.add_argument("--shapes", choices=("bert", "llama"), help="run one model; default: both")
    parser.add_argument("--batch-size", type=int, help="sequences in a batch; default: those of the shape")
    parser.add_argument("--density", type=float, default=0.01, help="trained share of each weight (default: 0.01)")
    parser.add_argument(
        "--contenders",
        choices=CONTENDERS_OF,
        default="all",
        help="variants: all names of SparseGrad, two-ways: with the delta on the weight and on the output, widths: "
        "SparseGrad with several core sizes, compiled: with torch.compile, checkpointed: with gradient checkpointing; "
        "these time the step alone",
    )
    parser.add_argument("--json", type=Path, default=Path("outputs/bench.json"), help="default: outputs/bench.json")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that the arguments ask for."""
    freed_memory_is_kept = keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    shapes = {k: v for k, v in SHAPES[device.type].items() if arguments.shapes in (None, k)}
    if arguments.batch_size is not None:
        shapes = {k: dataclasses.replace(v, batch=arguments.batch_size) for k, v in shapes.items()}
    result: dict[str, Any] = {
        "environment": describe_environment(device),
        "settings": {
            **{key: value for key, value in vars(arguments).items() if key != "json"},
            "freed_memory_is_kept": freed_memory_is_kept,
            "dtype": str(dtype_on(device)),
            "shapes": {name: dataclasses.asdict(shape) for name, shape in shapes.items()},
        },
    }
    if arguments.only in (None, "step"):
        names = CONTENDERS_OF[arguments.contenders]
        result["step"] = {
            name: benchmark_step(shape, device, arguments.rounds, arguments.density, names)
            for name, shape in shapes.items()
        }
    if arguments.only in (None, "warmup") and arguments.contenders == "all":
        result["warmup"] = benchmark_warmup(device)
    if arguments.only in (None, "graddrop") and arguments.contenders == "all":
        result["graddrop"] = {
            name: benchmark_graddrop(shape, device, 2 * arguments.rounds) for name, shape in shapes.items()
        }
        result["graddrop bytes"] = adapter_bytes(next(iter(shapes.values())), device)
    return result


def print_tables(result: dict[str, Any]) -> None:
    from peft_sparsegrad.cli.output import new_console  # rich, which the JSON does not need

    from .report import print_bytes, print_graddrop, print_step, print_targets, print_warmup

    console = new_console()
    for family, batches in result.get("step", {}).items():
        print_step(console, family, batches)
    if "warmup" in result:
        print_warmup(console, result["warmup"])
    for family, measured in result.get("graddrop", {}).items():
        print_graddrop(console, family, measured)
    if "graddrop bytes" in result:
        print_bytes(console, result["graddrop bytes"])
    print_targets(console, targets_of(result))


def main() -> None:
    arguments = parse_arguments()
    result = run(arguments)
    result["targets"] = [target.as_dict() for target in targets_of(result)]
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print_tables(result)
    print(f"Written to {arguments.json}")


if __name__ == "__main__":
    main()
