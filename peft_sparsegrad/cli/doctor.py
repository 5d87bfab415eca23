"""`peft-sparsegrad doctor`: what is installed, and what works on this machine."""

from __future__ import annotations

import platform
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from rich.console import Console

from .doctor_runs import (
    Skipped,
    run_add_adapter,
    run_cuda,
    run_four_bit,
    run_graddrop,
    run_lora_conversion,
    run_sparsegrad,
)
from .doctor_versions import conflicts, lacking
from .output import errors_only, new_console, print_facts, print_json, print_table
from .saved.methods import NEED_THE_IMPORT

# What is needed, and the extra that brings the rest.
_PACKAGES = {
    **dict.fromkeys(("torch", "peft", "transformers", "safetensors"), None),
    **dict.fromkeys(("accelerate", "datasets", "trl"), "train"),
    "bitsandbytes": "quantization",
    "matplotlib": "plot",
}
_WAY_OUT_OF_ADD_ADAPTER = (
    "use `get_peft_model` and `PeftModel.from_pretrained`, which do not need it, or install the peft that is asked "
    "for or, while there is none, an earlier transformers"
)
_RUNS: tuple[tuple[str, bool, Callable[[str], str], str], ...] = (
    ("SparseGrad: warm-up, step, save, load", True, run_sparsegrad, "report it with the versions above"),
    ("GradDrop: step, save, load", True, run_graddrop, "report it with the versions above"),
    ("conversion to LoRA", True, run_lora_conversion, "report it with the versions above"),
    ("transformers' own `model.add_adapter`", False, run_add_adapter, _WAY_OUT_OF_ADD_ADAPTER),
    ("4-bit base", False, run_four_bit, "pip install 'peft-sparsegrad[quantization]', in a version for this machine"),
    ("step on the GPU", False, run_cuda, "install the PyTorch that is made for this GPU's driver"),
)


@dataclass
class Check:
    """One thing that was tried.

    Attributes:
        name: What it was.
        status: `"pass"`, `"fail"` or `"skip"`.
        essential: Whether the package is of no use without it.
        detail: What was found, or why it failed.
        way_out: What to do about it.
    """

    name: str
    status: str
    essential: bool
    detail: str
    way_out: str = ""


def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")] = False,
) -> None:
    """Say which versions are installed, and try every part of the package on a tiny model with random weights.

    Exit status: 0, or 1 if something failed that the package cannot do without.
    """
    versions, checks = installed_versions(), [check_versions(), check_newer(), check_registration(), *run_checks()]
    if as_json:
        print_json({"versions": versions, "checks": [asdict(check) for check in checks]})
    else:
        _show(new_console(), versions, checks)
    raise typer.Exit(int(any(check.essential and check.status == "fail" for check in checks)))


def installed_versions() -> dict[str, str | None]:
    """Versions of what the package works with; None for what is not installed."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "peft-sparsegrad": _version("peft-sparsegrad"),
    }
    return {**found, **{name: _version(name) for name in _PACKAGES}, "GPU": _gpu()}


def check_versions() -> Check:
    """Check that the installed packages are of versions that they ask of each other."""
    found = conflicts(("peft-sparsegrad", *_PACKAGES))
    if found:
        return Check("versions that go together", "fail", True, "; ".join(found), "pip install what is asked for")
    return Check("versions that go together", "pass", True, "all that ask for one another")


def check_newer() -> Check:
    """Check that nothing the package can do needs newer versions than the installed ones."""
    found = lacking()
    if found:
        way_out = "upgrade what stands in brackets, if you want to use it"
        return Check("parts that need newer versions", "skip", False, "; ".join(found), way_out)
    return Check("parts that need newer versions", "pass", False, "none")


def check_registration() -> Check:
    """Check that PEFT knows both methods."""
    missing = [name for name in NEED_THE_IMPORT if PeftType.__members__.get(name) not in PEFT_TYPE_TO_TUNER_MAPPING]
    if missing:
        way_out = "reinstall peft: another package has changed its table of methods"
        return Check("registered in PEFT", "fail", True, f"missing: {', '.join(missing)}", way_out)
    return Check("registered in PEFT", "pass", True, f"{', '.join(NEED_THE_IMPORT)}, by `import peft_sparsegrad`")


def run_checks() -> list[Check]:
    """Try every part, whatever becomes of the others. What libraries print goes to stderr."""
    quiet = errors_only("bitsandbytes", "peft_sparsegrad")
    with warnings.catch_warnings(), redirect_stdout(sys.stderr), quiet:
        warnings.simplefilter("ignore")
        return [_try(*run) for run in _RUNS]


def _try(name: str, essential: bool, run: Callable[[str], str], way_out: str) -> Check:
    try:
        with TemporaryDirectory() as folder:
            return Check(name, "pass", essential, run(folder))
    except Skipped as reason:
        return Check(name, "skip", essential, str(reason), way_out)
    except Exception as error:  # whatever it is, it is what the user came to see
        message = str(error).strip().splitlines() or [""]
        return Check(name, "fail", essential, f"{type(error).__name__}: {message[0]}", way_out)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpu() -> str | None:
    if not torch.cuda.is_available():
        return None
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


def _show(console: Console, versions: dict[str, str | None], checks: list[Check]) -> None:
    for name, found in versions.items():
        extra = _PACKAGES.get(name)
        hint = f"not installed: pip install 'peft-sparsegrad[{extra}]'" if extra else "none"
        versions = {**versions, name: found or hint}
    print_facts(console, versions.items())
    rows = [(check.name, check.status, check.detail) for check in checks]
    print_table(console, "Tried on this machine", ("part", "", "found"), rows)
    for check in checks:
        if check.status == "fail":
            console.print(f"{check.name}: {check.way_out}", markup=False)
