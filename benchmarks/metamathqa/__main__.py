"""Run an experiment of this folder with the program of PEFT's MetaMathQA comparison, from a checkout of PEFT.

    python -m benchmarks.metamathqa --peft-source ~/peft sparsegrad/llama-3.2-3B-default -v

Options that are not listed here go to PEFT's program. It needs a GPU and access to meta-llama/Llama-3.2-3B, and writes
its result below `method_comparison/MetaMathQA` in the checkout, as for PEFT's own methods. No learning rate in
`training_params.json` is tuned for this task. An experiment with a `masks.json`, settings of `GradDropConfig`, trains
its adapter of another method with GradDrop's masks on it.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch

from peft_sparsegrad import GradDrop, GradDropConfig, SparseGradAdam

HERE = Path(__file__).resolve().parent
EXPERIMENTS = sorted(
    path.parent.relative_to(HERE / "experiments").as_posix()
    for path in HERE.glob("experiments/*/*/adapter_config.json")
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Hand an experiment over to PEFT's program, in this process, in which both methods are registered."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.metamathqa", description="Run an experiment of PEFT's MetaMathQA comparison."
    )
    parser.add_argument("experiment", choices=EXPERIMENTS, metavar="EXPERIMENT", help=", ".join(EXPERIMENTS))
    parser.add_argument("--peft-source", type=Path, required=True, metavar="PATH", help="checkout of PEFT")
    options, passed_on = parser.parse_known_args(arguments)
    script = options.peft_source.resolve() / "method_comparison" / "MetaMathQA" / "run.py"
    if not script.is_file():
        parser.error(f"--peft-source: there is no {script}; clone https://github.com/huggingface/peft")
    # The program takes the optimizer that `training_params.json` names from this module.
    torch.optim.SparseGradAdam = SparseGradAdam  # pyright: ignore[reportAttributeAccessIssue]
    masks = HERE / "experiments" / options.experiment / "masks.json"
    if masks.exists():  # and adapts the model with this function
        settings = json.loads(masks.read_text("utf-8"))
        peft.get_peft_model = masked(peft.get_peft_model, settings)  # pyright: ignore[reportAttributeAccessIssue]
    os.chdir(HERE)  # it takes paths of the form experiments/METHOD/NAME
    sys.path.insert(0, str(script.parent))
    sys.argv = [str(script), f"experiments/{options.experiment}", *passed_on]
    runpy.run_path(str(script), run_name="__main__")


def masked(get_peft_model: Callable[..., Any], settings: dict[str, Any]) -> Callable[..., Any]:
    """Return `get_peft_model` that also puts GradDrop's masks on what trains."""

    def adapt(*args: Any, **kwargs: Any) -> Any:
        model = get_peft_model(*args, **kwargs)
        model.graddrop = GradDrop(model, GradDropConfig(**settings))  # as long as the model lives
        return model

    return adapt


if __name__ == "__main__":
    main()
