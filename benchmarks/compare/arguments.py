"""The options of the command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.arguments import non_negative_int, positive_float, positive_int
from experiments.methods import METHODS

from .tasks import TASKS


def add_run_options(add: Callable[..., Any]) -> None:
    add("--model", required=True, help="folder of a checkpoint and its tokenizer")
    add("--data", type=Path, required=True, help="folder with cola/cola_{train,dev}.tsv, stsb/..., seed_tasks.jsonl")
    add("--tasks", nargs="+", choices=TASKS, default=["cola", "stsb"], metavar="TASK", help=f"of {', '.join(TASKS)}")
    add("--methods", nargs="+", choices=METHODS, required=True, metavar="METHOD", help=f"of {', '.join(METHODS)}")
    add("--settings", nargs="+", type=settings, default=["{}"], metavar="JSON", help=settings.__doc__)
    add("--seeds", nargs="+", type=int, default=[0], metavar="SEED", help="default: %(default)s")
    add("--lrs", nargs="+", type=positive_float, required=True, metavar="LR", help="peak learning rates")
    add("--density", type=positive_float, default=0.01, help="trained share of each weight (default: %(default)s)")
    add("--epochs", type=positive_int, default=3, help="default: %(default)s")
    add("--train-rows", type=positive_int, default=1600, help="rows to train on (default: %(default)s)")
    add("--batch-size", type=positive_int, default=16, help="default: %(default)s")
    add(
        "--head-steps",
        type=non_negative_int,
        default=0,
        help="steps that train the task head alone, first (default: 0)",
    )
    add("--evals", type=positive_int, default=3, help="evaluations along training (default: %(default)s)")
    add("--precision", choices=["float32", "bf16"], default="float32", help="default: %(default)s")
    add("--max-eval-rows", type=non_negative_int, default=0, help="dev rows to score (default: 0, all of them)")
    add("--out", type=Path, default=Path("outputs/compare.jsonl"), help="results file (default: %(default)s)")
    add(
        "--shard", type=shard, default=(0, 1), metavar="I/N", help="every N-th run, from the I-th; needs its own --out"
    )


def settings(text: str) -> str:
    """overrides for the method's configuration, like '{"rank": 192}'; several are as many runs (default: {})"""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, not {text}")
    return json.dumps(value, sort_keys=True)


def shard(text: str) -> tuple[int, int]:
    """A type for argparse: `0/2` as (0, 2)."""
    index, _, number = text.partition("/")
    if not (index.isdecimal() and number.isdecimal() and int(index) < int(number)):
        raise argparse.ArgumentTypeError(f"must be like 0/2 or 1/2, not {text}")
    return int(index), int(number)
