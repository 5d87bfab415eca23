"""Command line of the GPU benchmark: measures, writes one JSON file, prints tables."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.environment import describe_environment
from experiments.json_files import read_json, write_json
from experiments.terminal import run_and_exit
from peft_sparsegrad.cli.errors import InputError

from .process import ContenderFailed, rows_of_process
from .settings import CONTENDERS, SETTINGS, SMALL_SETTINGS, Setting
from .suite import run_gpu_tests
from .table import tables


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="A training step on a GPU.")
    parser.add_argument("--device", default="cuda:0", help="default: cuda:0")
    parser.add_argument("--small", action="store_true", help="tiny models, to try the program on a CPU")
    parser.add_argument("--shapes", choices=SETTINGS, nargs="+", default=list(SETTINGS), help="default: all")
    parser.add_argument("--contenders", choices=CONTENDERS, nargs="+", default=list(CONTENDERS), help="default: all")
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of each method (default: 20)")
    parser.add_argument("--minutes", type=float, default=2.5, help="begin nothing that would end later (default: 2.5)")
    parser.add_argument("--tests", action="store_true", help="first run the tests marked `gpu`, beside the minutes")
    parser.add_argument("--json", type=Path, default=Path("outputs/gpu.json"), help="default: outputs/gpu.json")
    parser.add_argument("--table", type=Path, metavar="FILE", help="only print the tables of a JSON file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0, or 1 if a test or a contender has failed."""
    options = parse_arguments(arguments)
    if options.table is not None:
        if (result := read_json(options.table)) is None:
            raise InputError(f"there is no file {options.table}: --table takes one that `--json` wrote")
        print(tables(result))
        return 0
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"no CUDA device is here for --device {options.device}: try `--device cpu --small`")
    result = begun(options, device)
    if options.tests:
        result["tests"] = run_gpu_tests(options.json.with_suffix(".tests.txt"))
        write_json(options.json, result)
    measure_all(options, device, result)
    print(tables(result))
    print(f"Written to {options.json}")
    return int(bool(result["failed"]) or result.get("tests", {}).get("status", 0) != 0)


def begun(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return what the JSON file holds so far, or the beginning of a new one.

    Raises:
        InputError: If the file is of another device, other versions or other settings.
    """
    environment = describe_environment(device)
    settings = {"small": options.small, "rounds": options.rounds, "autocast": "torch.bfloat16"}
    new: dict[str, Any] = {"environment": environment, "settings": settings, "rows": [], "failed": {}}
    old = read_json(options.json)
    if old is None:
        return new
    for part in ("environment", "settings"):
        for name, value in new[part].items():
            if name != "date" and old[part].get(name) != value:
                raise InputError(
                    f"{options.json} has {name} {old[part].get(name)!r}, this run {value!r}: give --json another file"
                )
    return old


def measure_all(options: argparse.Namespace, device: torch.device, result: dict[str, Any]) -> None:
    """Measure what `result` lacks, and write the file after each row."""
    end, table = time.perf_counter() + 60 * options.minutes, SMALL_SETTINGS if options.small else SETTINGS
    for shape in options.shapes:
        slowest = 0.0
        for name in options.contenders:
            if is_measured(result, shape, name, table[shape]):
                continue
            started = time.perf_counter()
            if started + slowest > end:
                print(f"{shape}, {name}: left out, it would not end in {options.minutes:g} minutes", flush=True)
                continue
            measure_one(options, device, result, shape, name)
            slowest = max(slowest, time.perf_counter() - started)


def measure_one(
    options: argparse.Namespace, device: torch.device, result: dict[str, Any], shape: str, name: str
) -> None:
    """Add the rows of a contender, or why it has none: one that does not fit leaves the others their turn."""
    setting = (SMALL_SETTINGS if options.small else SETTINGS)[shape]
    result["failed"].pop(f"{shape}, {name}", None)
    try:
        for row in rows_of_process(name, setting, device, options.rounds):
            add_row(result, {"shape": shape, "contender": name, "weights": str(setting.weights), **row})
            write_json(options.json, result)
            print(f"{shape}, {name}, {row['tokens']} tokens: {row['median_ms']:.1f} ms", flush=True)
    except ContenderFailed as error:
        result["failed"][f"{shape}, {name}"] = str(error)
        write_json(options.json, result)
        print(f"{shape}, {name}: failed: {error}", flush=True)


def is_measured(result: dict[str, Any], shape: str, name: str, setting: Setting) -> bool:
    """Return whether the rows of all batches are there."""
    found = {row["tokens"] for row in result["rows"] if (row["shape"], row["contender"]) == (shape, name)}
    return found >= set(setting.tokens)


def add_row(result: dict[str, Any], row: dict[str, Any]) -> None:
    """Add a row, in place of one of a run that was killed before its contender was complete."""
    keys = ("shape", "contender", "tokens")
    result["rows"] = [old for old in result["rows"] if any(old[key] != row[key] for key in keys)] + [row]


if __name__ == "__main__":
    run_and_exit(main)
