"""A contender in a process of its own: nothing of one model is in the times and bytes of the next."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

from . import measure
from .settings import Setting


class ContenderFailed(Exception):
    """A contender has no more rows; the message says why."""


def rows_of_process(name: str, setting: Setting, device: torch.device, rounds: int) -> Iterator[measure.Row]:
    """Yield the rows of `measure_contender` as a new process measures them.

    The process is forked from a server that has imported everything and used no GPU: it begins within a second.

    Raises:
        ContenderFailed: If the process could not measure it, or died.
    """
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # else an import asks CUDA for a GPU, and no fork can use one
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([measure.__name__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_rows, args=(sender, name, setting, device, rounds), daemon=True)
    process.start()
    sender.close()  # so that the pipe ends with the process
    with receiver:
        yield from _received(receiver)
    process.join()
    if process.exitcode != 0:
        raise ContenderFailed(f"its process ended with exit code {process.exitcode}")


def _send_rows(sender: Connection, *arguments: Any) -> None:
    """Send each row, or in the end a string that says why there are no more."""
    with sender:
        try:
            for row in measure.measure_contender(*arguments):
                sender.send(row)
        except (RuntimeError, ValueError) as error:
            sender.send(f"{type(error).__name__}: {error}")


def _received(receiver: Connection) -> Iterator[measure.Row]:
    """Yield what `_send_rows` sends, until its process closes the pipe or dies."""
    while True:
        try:
            message = receiver.recv()
        except EOFError:
            return
        if isinstance(message, str):
            raise ContenderFailed(message)
        yield message
