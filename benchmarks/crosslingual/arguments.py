"""The options of the command line, and the plan that they stand for."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.xglue.runs import FINE_TUNING
from examples.xglue.tasks import TASKS
from examples.xglue.train import languages_of
from experiments.arguments import positive_float, positive_int
from experiments.loading import DEVICE
from experiments.methods import METHODS
from peft_sparsegrad.cli.errors import InputError

from .plan import Plan

BY_VALUE = (
    *(FINE_TUNING, "layer-graddrop", "graddrop-epoch", "anneal-layer-graddrop", "graddrop", "gradfreeze-topdown"),
    *("anneal-graddrop", "graddrop-epoch-reset", "graddrop-epoch-toggle", "gradfreeze-bottomup"),
    "gradfreeze-toggle-topdown",
)
"""Plain fine-tuning, then the variants in the order of the paper's averages, those without one at the end."""


def add_run_options(add: Callable[..., Any]) -> None:
    add("--model", required=True, help="folder of an encoder and its tokenizer")
    add("--data", type=Path, required=True, help="folder with sib200/ and ud/, see examples/xglue/README.md")
    add("--out", type=Path, default=Path("outputs/crosslingual.jsonl"), help="results file (default: %(default)s)")
    add("--tasks", nargs="+", choices=TASKS, default=["SIB-200", "UD"], metavar="TASK", help=f"of {', '.join(TASKS)}")
    add("--methods", nargs="+", choices=METHODS, default=BY_VALUE, metavar="METHOD", help=f"of {', '.join(METHODS)}")
    add("--languages", nargs="+", help="languages to score, of those that each task has (default: all of them)")
    rates = [5e-5, 1e-4, 2e-4, 4e-4]
    add("--lrs", nargs="+", type=positive_float, default=rates, metavar="LR", help="rates to search: %(default)s")
    add("--seeds", type=positive_int, default=5, help="seeds at the best rate (default: %(default)s)")
    add("--search-seeds", type=positive_int, default=1, help="seeds of the search for it (default: %(default)s)")
    add("--epochs", type=positive_int, default=6, help="default: %(default)s")
    add("--batch-size", type=positive_int, default=32, help="default: %(default)s")
    add("--max-length", type=positive_int, default=128, help="tokens of a row (default: %(default)s)")
    add("--max-rows", type=positive_int, default=704, help="the first rows of each file (default: %(default)s)")
    add("--dropout", type=float, default=0.0, help="rate of the model's own dropout (default: %(default)s)")
    add("--precision", choices=["float32", "bf16"], default="float32", help="default: %(default)s")
    add("--device", choices=["cpu", "cuda"], default=DEVICE, help="where it must run (default: %(default)s)")
    add("--workers", type=positive_int, default=1, help="runs at once (default: %(default)s)")
    add("--minutes", type=positive_float, default=float("inf"), help="start no run that would not end by then")


def plan_of(arguments: argparse.Namespace) -> Plan:
    """Return the plan that the options stand for.

    Raises:
        InputError: If the options do not fit each other, or there is no such device.
    """
    if arguments.device != DEVICE:
        raise InputError(f"--device {arguments.device}, but torch uses {DEVICE} here: see CUDA_VISIBLE_DEVICES")
    if arguments.search_seeds > arguments.seeds:
        raise InputError(f"--search-seeds {arguments.search_seeds} are more than --seeds {arguments.seeds}")
    return Plan(
        tasks=tuple(arguments.tasks),
        methods=tuple(arguments.methods),
        rates=tuple(sorted(arguments.lrs)),
        seeds=arguments.seeds,
        search_seeds=arguments.search_seeds,
        common={task: _settings(arguments, task) for task in arguments.tasks},
    )


def _settings(arguments: argparse.Namespace, task: str) -> dict[str, Any]:
    names = ("model", "epochs", "batch_size", "max_length", "max_rows", "dropout", "precision")
    return {
        **{name: getattr(arguments, name) for name in names},
        "data": str(arguments.data),
        "split": "test",
        "languages": languages_of(task, arguments.languages),
        "embeddings": "frozen",
        "blocks_per_epoch": 0,
        "density": 0.01,
        "target_modules": (),
    }
