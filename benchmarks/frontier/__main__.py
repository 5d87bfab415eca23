"""Command line of the frontier."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from experiments.arguments import positive_float, positive_int
from experiments.loading import DEVICE
from experiments.terminal import run_and_exit
from peft_sparsegrad.cli.errors import InputError

from .costs import measure_missing
from .methods import METHODS
from .plot import plot
from .precision import PRECISIONS
from .runs import Plan, Run
from .table import tables
from .tasks import DEFAULTS, TASKS
from .train import Workplace
from .workers import Campaign


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frontier", description="Score against cost.")
    commands = parser.add_subparsers(required=True, metavar="{run,costs,methods,table,plot}")
    run = commands.add_parser("run", help="do the runs that are not in the results file yet")
    run.set_defaults(command=run_campaign)
    add_common_options(run.add_argument)
    run.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="the first one searches (0 1 2)")
    run.add_argument("--lr", nargs="+", type=positive_float, help="of all seeds (default: search)")
    run.add_argument("--workers", type=positive_int, default=1, help="processes on the device (default: 1)")
    costs = commands.add_parser("costs", help="measure step time and memory; nothing else may run beside it")
    costs.set_defaults(command=measure_costs)
    add_common_options(costs.add_argument)
    costs.add_argument("--rounds", type=positive_int, default=15, help="timed steps (default: %(default)s)")
    listing = commands.add_parser("methods", help="list the names of the methods")
    listing.set_defaults(command=lambda _: print("\n".join(METHODS)))
    table = commands.add_parser("table", help="print a Markdown table for each task")
    table.set_defaults(command=lambda given: print(tables(given.results, given.costs)))
    picture = commands.add_parser("plot", help="write a picture for each model, as PNG and SVG")
    picture.set_defaults(command=lambda given: print(*plot(given.results, given.costs, given.out), sep="\n"))
    picture.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to write to")
    for command in (table, picture):
        command.add_argument("results", type=Path, nargs="+", metavar="FILE", help="file that `run` wrote")
        command.add_argument("--costs", type=Path, nargs="+", default=[], metavar="FILE", help="that `costs` wrote")
    return parser.parse_args(arguments)


def add_common_options(add: Any) -> None:
    add("--task", nargs="+", choices=TASKS, required=True, metavar="TASK", help=f"of {', '.join(TASKS)}, of one model")
    add("--model", type=Path, required=True, help="folder of the checkpoint and its tokenizer")
    add("--data", type=Path, required=True, help="folder with cola/, stsb/, oasst/ and ud/")
    add("--out", type=Path, required=True, metavar="FILE", help="file to which lines are added")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help="default: all")
    add("--steps", type=positive_int, help="backward passes of a run, warm-up included (default: the task's)")
    add("--batch-size", type=positive_int, help="default: the task's")
    add("--device", choices=["cpu", "cuda"], default=DEVICE, help="default: %(default)s")
    add("--precision", choices=PRECISIONS, help="default: bf16 on a GPU, float32 on a CPU")
    add("--minutes", type=positive_float, help="start nothing that would end later than that")


def run_campaign(arguments: argparse.Namespace) -> int:
    """Do what is missing. Returns 1 where a run failed."""
    started = time.monotonic()
    campaign = Campaign(
        replace(plan_of(arguments, tuple(arguments.seeds)), rates=arguments.lr and tuple(arguments.lr)),
        arguments.out,
        arguments.model,
        arguments.data,
        arguments.device,
        arguments.workers,
        None if arguments.minutes is None else started + 60 * arguments.minutes,
    )
    campaign.go()
    missing = sum(1 for _ in campaign.plan.missing(campaign.results))
    print(f"{len(campaign.results)} runs in {arguments.out}, at least {missing} missing", flush=True)
    for (task, method), reason in campaign.failed.items():
        print(f"failed: {task}, {method}: {reason}", file=sys.stderr)
    return 1 if campaign.failed else 0


def plan_of(arguments: argparse.Namespace, seeds: tuple[int, ...]) -> Plan:
    """Return the plan that the options ask for."""
    check_folders(arguments)
    batch_size, steps = DEFAULTS[arguments.task[0]]
    return Plan(
        model=arguments.model.resolve().name,
        tasks=tuple(arguments.task),
        methods=tuple(arguments.methods),
        seeds=seeds,
        steps=arguments.steps or steps,
        batch_size=arguments.batch_size or batch_size,
        precision=arguments.precision or ("bf16" if arguments.device == "cuda" else "float32"),
    )


def check_folders(arguments: argparse.Namespace) -> None:
    """Raise an InputError for what would stop the first run in a worker process."""
    if not (arguments.model / "config.json").is_file():
        raise InputError(f"{arguments.model} is no folder of a model: it has no config.json")
    if not arguments.data.is_dir():
        raise InputError(f"there is no folder {arguments.data}: --data is the folder with cola/, stsb/, oasst/, ud/")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise InputError("this machine has no GPU that torch can use: leave --device away")
    if "smollm2" in arguments.task and len(arguments.task) > 1:
        raise InputError("--task smollm2 has a model of its own: run it apart from cola and stsb")


def measure_costs(arguments: argparse.Namespace) -> int:
    """Measure each method on each task."""
    started, plan = time.monotonic(), plan_of(arguments, (0,))
    place = Workplace(arguments.model, arguments.data, torch.device(arguments.device), plan.precision)
    runs: list[Run] = [plan.run(task, method, 0, 0.0) for task in plan.tasks for method in plan.methods]
    deadline = None if arguments.minutes is None else started + 60 * arguments.minutes
    measure_missing(place, runs, arguments.out, arguments.rounds, deadline)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 2, with one line on stderr, where the input cannot be used; 1 where a run failed."""
    parsed = parse_arguments(arguments)
    try:
        return parsed.command(parsed) or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    run_and_exit(main)
