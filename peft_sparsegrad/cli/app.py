"""The verbs of `peft-sparsegrad`, and how errors end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from .. import __version__
from .convert import convert_command
from .diff import diff_command
from .doctor import doctor_command
from .errors import one_line_errors
from .inspect import inspect_command
from .plot import plot_command
from .warmup import warmup_command

app = typer.Typer(
    name="peft-sparsegrad",
    help="Look at, compare, convert and draw SparseGrad and GradDrop adapters.",
    epilog="Exit status: 0; 1 if `diff` finds a difference or `doctor` a fault; 2 for input that cannot be used.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("inspect")(inspect_command)
app.command("diff")(diff_command)
app.command("convert")(convert_command)
app.command("warmup")(warmup_command)
app.command("plot")(plot_command)
app.command("doctor")(doctor_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def run(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its status: 2 and one line on stderr where the input cannot be used.

    Args:
        arguments: Words after the program's name; None for those of the process.
    """
    with one_line_errors():
        app(arguments, prog_name="peft-sparsegrad")
