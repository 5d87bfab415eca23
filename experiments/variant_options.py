"""Options for the settings of `SparseGradConfig`, on top of those that a method's name stands for, and LoRA's rank."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

from peft_sparsegrad import SparseGradConfig
from peft_sparsegrad.cli.errors import InputError
from peft_sparsegrad.common.targeted_config import TargetedConfig
from peft_sparsegrad.sparsegrad.config import NAMED_RANKS

from .arguments import positive_float, positive_int

RANKS = ", ".join((*NAMED_RANKS, "a number", "OUT,IN"))
OF_PROGRAM = {"density", "num_values", "warmup_steps"}  # the programs have options of these names
SETTINGS = [
    field.name
    for field in fields(SparseGradConfig)
    if field.name not in OF_PROGRAM.union(field.name for field in fields(TargetedConfig))
]


def add_variant_options(add: Callable[..., Any]) -> None:
    """Add the options to a parser or a group of it, whose `add_argument` this is."""
    add("--rank", type=rank, help=f"of SparseGrad: columns of V and U: {RANKS} (the method's)")
    bases = ["hosvd", "columns", "svd", "identity"]
    add("--basis", choices=bases, help="of SparseGrad: where U and V come from (the method's)")
    add("--support", choices=["static", "dynamic"], help="of SparseGrad: see `SparseGradConfig` (the method's)")
    add("--slack", type=positive_float, help="of SparseGrad: entries of the core per trained value (the method's)")
    add(
        "--set",
        nargs="+",
        type=setting,
        default=[],
        metavar="NAME=VALUE",
        help=f"further settings of SparseGrad, of {', '.join(SETTINGS)} (the method's)",
    )
    add("--lora-rank", type=positive_int, help="rank of LoRA (default: the one with as many values as SparseGrad)")


def settings_json(args: argparse.Namespace, method: str) -> str:
    """Return `method_settings` as JSON with sorted keys, the form in which a run has them."""
    return json.dumps(method_settings(args, method), sort_keys=True)


def method_settings(args: argparse.Namespace, method: str) -> dict[str, Any]:
    """Return what the options set for a method: overrides for its `attach`.

    Raises:
        InputError: The settings do not go together with those that the method's name stands for.
    """
    if method == "lora":
        return {} if args.lora_rank is None else {"rank": args.lora_rank}
    if method not in SparseGradConfig.variants:
        return {}
    settings = _sparsegrad_settings(args)
    try:
        SparseGradConfig.from_variant(method, **settings)
    except ValueError as error:
        raise InputError(f"{method}: {error}") from error
    return settings


def check_settings_have_effect(args: argparse.Namespace, methods: Iterable[str]) -> None:
    """Raise an InputError if an option is given that concerns none of the methods."""
    methods = set(methods)
    settings = _sparsegrad_settings(args)
    if settings and methods.isdisjoint(SparseGradConfig.variants):
        raise InputError(f"`{next(iter(settings))}` is a setting of {', '.join(SparseGradConfig.variants)}: none runs")
    if args.lora_rank is not None and "lora" not in methods:
        raise InputError("--lora-rank concerns the method lora, which is not run")


def rank(text: str) -> Any:
    """A type for argparse: `auto`, `full`, `narrower`, `64`, or `64,none` for a pair (out, in)."""
    if text in NAMED_RANKS:
        return text
    numbers = [None if part == "none" else positive_int(part) for part in text.split(",")]
    if len(numbers) > 2 or numbers == [None]:
        raise argparse.ArgumentTypeError(f"must be one of {RANKS}, not {text}")
    return numbers[0] if len(numbers) == 1 else tuple(numbers)


def setting(text: str) -> tuple[str, Any]:
    """A type for argparse: `renewal_steps=0` as a name and the value, which is JSON or else a text."""
    name, equals, value = text.partition("=")
    if not equals or name not in SETTINGS:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE with a name of {', '.join(SETTINGS)}, not {text}")
    if name == "rank":
        return name, rank(value)
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _sparsegrad_settings(args: argparse.Namespace) -> dict[str, Any]:
    named = {name: getattr(args, name) for name in ("rank", "basis", "support", "slack")}
    return {**{name: value for name, value in named.items() if value is not None}, **dict(args.set)}
