"""The program itself: help, exit statuses, and machines on which a package is missing."""

import re
from importlib.metadata import EntryPoint

import pytest
import typer
from fresh import ROOT, run_program

from peft_sparsegrad import __version__
from peft_sparsegrad.cli import main
from peft_sparsegrad.cli.app import app

VERBS = ["inspect", "diff", "convert", "warmup", "plot", "doctor"]


@pytest.mark.parametrize("verb", VERBS)
def test_help_explains_every_option_and_the_exit_statuses(command, verb):
    result = command(verb, "--help")
    assert result.code == 0
    assert "Exit status: 0" in result.out
    parameters = typer.main.get_command(app).commands[verb].params
    assert {name for each in parameters for name in each.opts} >= {"--json"}
    for parameter in parameters:
        assert len(parameter.help or "") > 10, f"{parameter.name} is not explained"


def test_all_verbs_are_listed(command):
    out = command("--help").out
    assert all(f" {verb} " in out for verb in VERBS)
    assert command("--version").out == f"{__version__}\n"


def test_wrong_words_end_in_2(command):
    assert command("inspct").code == 2
    assert command("convert", "x", "--to", "something", "--out", "y").code == 2
    assert command("diff", "x").code == 2
    assert command().code == 2


def test_module_is_the_program():
    done = run_program("-m", "peft_sparsegrad", "inspect", "no-such-adapter")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("error: no-such-adapter is not there")
    assert "Traceback" not in done.stderr


def test_console_script_is_the_same_program():
    declared = re.search(r'^peft-sparsegrad = "(.*)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert EntryPoint("peft-sparsegrad", declared[1], "console_scripts").load() is main


def test_library_needs_none_of_the_extras():
    """Its import brings in neither typer nor matplotlib; the program says which one is missing."""
    code = """
import sys
sys.modules.update(typer=None, matplotlib=None)
import peft_sparsegrad
assert not [name for name in sys.modules if name.startswith(("peft_sparsegrad.cli", "peft_sparsegrad.plots"))]
from peft_sparsegrad.cli import main
main()
"""
    done = run_program("-c", code)
    assert (done.returncode, done.stdout) == (2, "")
    message = "error: the command line needs typer and rich: pip install 'peft-sparsegrad[cli]'"
    assert done.stderr.splitlines()[-1] == message
