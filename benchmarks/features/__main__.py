"""What PEFT's users expect of a method, tried with LoRA, SHiRA and C3A beside ours: a table of what works.

    python -m benchmarks.features --json docs/results/features.json

Every cell is an attempt on a model of random weights. "yes" means that it ran and that the outputs were right; any
other is the class of the error, or how the result was wrong.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import C3AConfig, LoraConfig, PeftConfig, ShiraConfig

from experiments.environment import describe_environment
from experiments.tables import markdown_table
from peft_sparsegrad import GradDropConfig, SparseGradConfig

from .attempts import FEATURES, MakeConfig, WrongError

MLP = ["up_proj", "down_proj"]


def _method(config: type[PeftConfig], **settings: Any) -> MakeConfig:
    return lambda **overrides: config(**{"target_modules": MLP, "task_type": "CAUSAL_LM", **settings, **overrides})


METHODS: dict[str, MakeConfig] = {
    "LoRA": _method(LoraConfig, init_lora_weights=False),
    "SHiRA": _method(ShiraConfig, r=4, init_weights=False),
    "C3A": _method(C3AConfig, block_size=8, init_weights=False),
    "SparseGrad": _method(SparseGradConfig, warmup_steps=0, init_weights=False),
    "GradDrop": _method(GradDropConfig, init_weights=False),
}


def attempt(feature: Callable[[MakeConfig], None], make_config: MakeConfig) -> str:
    """Return "yes", or how it failed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            feature(make_config)
    except WrongError as error:
        return str(error)
    except Exception as error:  # every kind of failure is a result here
        return f"no: {type(error).__name__}"
    return "yes"


def table(cells: dict[str, dict[str, str]]) -> str:
    """The cells in Markdown."""
    rows = [[name, *row.values()] for name, row in cells.items()]
    return markdown_table(["", *METHODS], rows, labels=1 + len(METHODS))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.features", description=__doc__)
    parser.add_argument("--json", type=Path, help="file to write the cells to")
    arguments = parser.parse_args()
    cells = {
        name: {method: attempt(feature, make) for method, make in METHODS.items()}
        for name, feature in FEATURES.items()
    }
    print(table(cells))
    if arguments.json is not None:
        result = {"environment": describe_environment(torch.device("cpu")), "cells": cells}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
