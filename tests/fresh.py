"""Programs in fresh processes: they start as from a shell, but with the large libraries imported already."""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import sys
import tempfile
import types
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARIES = ["torch", "transformers.trainer", "peft", "datasets"]
STREAMS = {"stdin": os.O_RDONLY, "stdout": os.O_WRONLY, "stderr": os.O_WRONLY}


def environment(**further: str) -> dict[str, str]:
    """Return this process's environment for one that compiles nothing, with one thread and no network.

    Dynamo is off because bitsandbytes, which PEFT imports, otherwise loads all of Inductor: a fifth of such a
    process's time.
    """
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1", **further}


class Program:
    """A Python program in a process of its own, forked from one that has imported `LIBRARIES` and done no more.

    A start so takes a second and not the ten of the imports. The package under test is not among them.

    Args:
        arguments: What follows `python` in a shell: `-m` and a module, `-c` and code, or a script, then its arguments.
        typed: What the program reads from its standard input.
        folder: Its working directory.
        variables: Changes to its environment.
    """

    def __init__(self, *arguments: object, typed: str = "", folder: Path = ROOT, **variables: str) -> None:
        self._streams = tempfile.TemporaryDirectory()
        for name in STREAMS:
            Path(self._streams.name, name).write_text(typed if name == "stdin" else "")
        given = (list(map(str, arguments)), self._streams.name, str(folder), environment(**variables))
        self._process = fork_server().Process(target=_become, args=given, daemon=True)
        self._process.start()

    @property
    def stdout(self) -> str:
        """All that it has printed so far."""
        return Path(self._streams.name, "stdout").read_text()

    @property
    def stderr(self) -> str:
        return Path(self._streams.name, "stderr").read_text()

    @property
    def returncode(self) -> int | None:
        """Its exit status, minus the number of the signal that ended it, or None while it runs."""
        return self._process.exitcode

    def wait(self, seconds: float = 200) -> int:
        """Return the exit status once the program has ended."""
        self._process.join(seconds)
        if self.returncode is None:
            self.kill()
            raise TimeoutError(f"it has not ended in {seconds} s: {self.stdout}{self.stderr}")
        return self.returncode

    def kill(self) -> None:
        """End the program with SIGKILL."""
        self._process.kill()
        self._process.join()


def run_program(*arguments: object, typed: str = "", folder: Path = ROOT, **variables: str) -> Program:
    """Return a `Program` that has ended."""
    program = Program(*arguments, typed=typed, folder=folder, **variables)
    program.wait()
    return program


@cache
def fork_server() -> ForkServerContext:
    """Return the context whose processes are forked from one that has imported `LIBRARIES`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


def _become(arguments: list[str], streams: str, folder: str, variables: dict[str, str]) -> None:
    """Run a program in this process as `python` does, with streams, folder and environment of its own."""
    gc.freeze()  # collections of garbage need not walk through the libraries
    for number, (name, flags) in enumerate(STREAMS.items()):
        os.dup2(os.open(Path(streams, name), flags), number)
    sys.stdin = open(0)  # noqa: SIM115 as long as the process
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    kind = arguments[0]
    sys.argv = arguments[0 if kind.endswith(".py") else 1 :]
    sys.path[:0] = [str(Path(kind).parent) if kind.endswith(".py") else folder]
    if kind == "-m":
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv[0] = "-c"
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(arguments[1], "<string>", "exec"), vars(main))
    else:
        runpy.run_path(kind, run_name="__main__")
