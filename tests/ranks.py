"""Run functions on several ranks that talk through gloo.

A server that has imported everything is forked for each rank of each call, so that a call takes a second or two and
not the ten that imports take. The server itself is forked from the one that all fresh programs come from.
"""

from __future__ import annotations

import datetime
import gc
import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fresh import environment, fork_server

TIMEOUT = 20  # seconds after which a rank that waits for another gives up
HANGS = 90  # seconds after which a call is said to hang


class Failure(Exception):
    """Some ranks ended with an error.

    Attributes:
        errors: The message of each rank, "" where there was no error, "hangs" or "died" where there was no message.
    """

    def __init__(self, errors: list[str], logs: list[str]) -> None:
        super().__init__("\n\n".join(f"rank {rank}: {error}\n{logs[rank]}" for rank, error in enumerate(errors)))
        self.errors = errors


class Ranks:
    """A server for functions.

    Args:
        folder: Folder for the results.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._calls = folder, 0
        self._connection, other_end = multiprocessing.Pipe()
        self._server = fork_server().Process(target=_serve, args=(other_end, environment()), daemon=True)
        self._server.start()
        other_end.close()

    def run(self, script: Path, function: str, world: int = 2, **arguments: Any) -> list[Any]:
        """Return what a function returned on each rank; with `backend="nccl"` each rank has a GPU.

        Args:
            script: Path of the module of the function, which the server imports once.
            function: Its name. It takes keyword arguments and returns what `torch.save` can save.
            world: The number of ranks.
            arguments: What the function is called with.

        Raises:
            Failure: If it ended with an error on some rank.
        """
        import torch

        self._calls += 1
        out = self._folder / f"{self._calls}-{function}"
        out.mkdir()
        self._connection.send((script, function, world, out, arguments))
        errors = self._connection.recv()
        if any(errors):
            raise Failure(errors, [(out / f"log{rank}").read_text()[-3000:] for rank in range(world)])
        return [torch.load(out / f"result{rank}", map_location="cpu") for rank in range(world)]

    def stop(self) -> None:
        """End the server."""
        self._server.kill()
        self._server.join()


def _serve(connection: Connection, variables: dict[str, str]) -> None:
    import torch

    os.environ.update(variables)
    torch.set_num_threads(1)
    while True:
        script, name, world, folder, arguments = connection.recv()
        if (path := str(script.parent)) not in sys.path:
            sys.path.insert(0, path)
        function = getattr(importlib.import_module(script.stem), name)
        gc.freeze()  # collections of garbage on the ranks need not walk through the libraries
        connection.send(_call(function, world, folder, arguments))


def _call(function: Any, world: int, folder: Path, arguments: dict[str, Any]) -> list[str]:
    """Run a function on every rank, and return the error of each."""
    processes = {}
    for rank in range(world):
        process = os.fork()
        if process == 0:
            _run_as(rank, world, function, folder, arguments)
        processes[process] = rank
    errors, end = [""] * world, time.monotonic() + HANGS
    while processes and time.monotonic() < end:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            rank = processes.pop(process)
            written = folder / f"error{rank}"
            errors[rank] = "" if status == 0 else written.read_text() if written.exists() else "died"
        else:
            time.sleep(0.02)
    for process, rank in processes.items():
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        errors[rank] = "hangs"
    return errors


def _run_as(rank: int, world: int, function: Any, folder: Path, arguments: dict[str, Any]) -> None:
    import torch
    import torch.distributed as dist

    log = os.open(folder / f"log{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    backend = arguments.pop("backend", "gloo")
    try:
        if backend == "nccl":
            torch.cuda.set_device(rank)
        if world > 1:
            limit = datetime.timedelta(seconds=TIMEOUT)
            store = f"file://{folder}/store"
            dist.init_process_group(backend, init_method=store, rank=rank, world_size=world, timeout=limit)
        torch.save(function(**arguments), folder / f"result{rank}")
    except BaseException as error:
        traceback.print_exc()
        (folder / f"error{rank}").write_text(f"{type(error).__name__}: {error}")
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)  # without destructors, which wait for gloo's threads
