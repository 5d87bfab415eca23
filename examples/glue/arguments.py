"""Options that training and search have in common, and what they stand for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.integrations.integration_utils import get_available_reporting_integrations

from experiments.arguments import non_negative_float, non_negative_int, positive_float, positive_int, share
from experiments.attachment import masks_gradients
from experiments.loading import DEVICE, load_pretrained
from experiments.methods import METHODS
from experiments.training import LR_WARMUP
from experiments.variant_options import add_variant_options, check_settings_have_effect, settings_json
from peft_sparsegrad.cli.errors import InputError

from .dataset import Splits, load_task, take_rows, tokenize
from .finetune import Finetuner
from .model import build_model
from .runs import Run
from .tasks import PAPER_TASKS, TASKS

# GradDrop's methods mask what another method trains, on other layers: examples/classify.py has them.
GLUE_METHODS = [name for name in METHODS if not masks_gradients(name)]
PAPER_METHODS = ["full", "lora", "meprop-paper", "paper"]


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    _add_what(parser)
    _add_model(parser)
    add_variant_options(parser.add_argument_group("settings of the methods").add_argument)
    _add_training(parser)


def _add_what(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help="checkpoint with an encoder: a folder or a hub id (no default)")
    add("--data", type=Path, metavar="DIR", help="folder above the tasks' folders (default: the hub's nyu-mll/glue)")
    add(
        "--tasks",
        nargs="+",
        choices=list(TASKS),
        default=PAPER_TASKS,
        metavar="TASK",
        help=f"tasks: {', '.join(TASKS)} (default: all but wnli, as in the paper)",
    )
    add(
        "--methods",
        nargs="+",
        choices=GLUE_METHODS,
        default=PAPER_METHODS,
        metavar="METHOD",
        help=f"ways of fine-tuning: {', '.join(GLUE_METHODS)} (default: {' '.join(PAPER_METHODS)})",
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--rest",
        choices=["trained", "frozen"],
        default="trained",
        help="the model outside the MLP layers; the task head always trains (default: %(default)s, as in the paper)",
    )
    add("--density", type=share, default=0.01, help="trained share of each MLP weight (default: %(default)s)")
    add("--target-modules", nargs="+", metavar="NAME", help="linear layers to adapt (default: the MLP's)")
    add("--warmup-steps", type=positive_int, default=32, help="batches of SparseGrad's warm-up (default: %(default)s)")
    add(
        "--head-steps",
        type=non_negative_int,
        default=60,
        help="SparseGrad, MeProp: steps before the warm-up that train all but their values (default: %(default)s)",
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--epochs", type=positive_int, default=20, help="most passes over the training rows (default: %(default)s)")
    add(
        "--patience",
        type=positive_int,
        default=3,
        help="epochs without a better score after which a run stops (default: %(default)s)",
    )
    add("--train-rows", type=positive_int, help="training rows, drawn at random (default: all)")
    add("--dev-rows", type=positive_int, help="rows that are scored, drawn at random, the same ones always (all)")
    add("--max-length", type=positive_int, default=128, help="tokens that are kept of a row (default: %(default)s)")
    add(
        "--precision",
        choices=["float32", "bf16"],
        default="float32",
        help="bf16 is mixed precision (default: %(default)s)",
    )
    add(
        "--adapter-lr",
        type=positive_float,
        help="learning rate of the method's own values, where it is not the rest's (default: the same)",
    )
    add(
        "--weight-decay",
        type=non_negative_float,
        default=0.0,
        help="of the model's own weights (default: %(default)s)",
    )
    add(
        "--lr-warmup",
        type=non_negative_float,
        default=LR_WARMUP,
        help="share of the steps in which the learning rate rises, to fall to 0 on a line after them (%(default)s)",
    )
    add(
        "--report-to",
        nargs="+",
        default=["none"],
        metavar="TRACKER",
        help="trackers that the Trainer logs to, tensorboard or wandb for instance (default: none)",
    )


def run_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a `Run` that are the same for all runs of a command."""
    return {
        "model": args.model,
        "data": None if args.data is None else str(args.data),
        "rest": args.rest,
        "target_modules": None if args.target_modules is None else tuple(args.target_modules),
        "epochs": args.epochs,
        "patience": args.patience,
        "train_rows": args.train_rows,
        "dev_rows": args.dev_rows,
        "max_length": args.max_length,
        "warmup_steps": args.warmup_steps,
        "head_steps": args.head_steps,
        "precision": args.precision,
        "adapter_lr": args.adapter_lr,
        "weight_decay": args.weight_decay,
        "lr_warmup": args.lr_warmup,
    }


def settings_of_methods(args: argparse.Namespace) -> dict[str, str]:
    """The `settings` of the runs of each method. Raises an InputError if they have no meaning or no effect."""
    check_settings_have_effect(args, args.methods)
    return {method: settings_json(args, method) for method in args.methods}


def capacity(method: str, density: float, num_values: int | None = None) -> dict[str, Any]:
    """The fields of a `Run` that say how much of a target weight trains; regular fine-tuning trains all of it."""
    return {"density": 1.0, "num_values": None} if method == "full" else {"density": density, "num_values": num_values}


def make_finetuner(args: argparse.Namespace, tasks: Iterable[str], folder: Path) -> Finetuner:
    """Read the tokenizer and the rows of all tasks. Raises an InputError if something cannot be used."""
    report_to = _trackers(args.report_to)
    if args.precision == "bf16" and DEVICE == "cuda" and not torch.cuda.is_bf16_supported():
        raise InputError("--precision bf16: this GPU has no bfloat16")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    tokenizer = load_pretrained(AutoTokenizer, args.model)
    splits = {name: _tokenized(name, tokenizer, args) for name in tasks}
    return Finetuner(tokenizer, splits, folder, report_to)


def _trackers(names: list[str]) -> list[str]:
    chosen = [name for name in names if name != "none"]
    installed = get_available_reporting_integrations()
    if missing := [name for name in chosen if name not in installed]:
        raise InputError(f"--report-to {missing[0]} is not installed here, or no tracker that the Trainer knows")
    return chosen


def _tokenized(name: str, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> Splits:
    splits = load_task(TASKS[name], args.data)
    take_rows(splits.train, args.train_rows, seed=0)  # whether there are so many
    chosen = Splits(splits.train, take_rows(splits.dev, args.dev_rows, seed=0, option="--dev-rows"))
    return Splits(*(tokenize(rows, TASKS[name], tokenizer, args.max_length) for rows in chosen))


def check_models(runs: Sequence[Run]) -> None:
    """Attach every kind of adapter once, so that what cannot be attached fails now and not after hours."""
    kinds = {(run.method, run.settings, run.density, run.num_values): run for run in runs}
    for run in kinds.values():
        build_model(run, TASKS[run.task])
