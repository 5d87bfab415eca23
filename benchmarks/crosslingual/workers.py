"""Runs side by side, in worker processes: a result is written as soon as it is there."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import warnings
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from pathlib import Path

import torch
import transformers

from examples.xglue.runs import Run
from experiments.json_files import Record
from experiments.results import append_result, read_results

from .plan import Plan
from .train import execute

MARGIN = 1.2  # a run may take that many times what the longest one took


def carry_out(plan: Plan, path: Path, workers: int, minutes: float) -> bool:
    """Do what is not done, one line in the results file for each run.

    Args:
        plan: Says which run is next.
        path: The results file, which need not exist.
        workers: How many runs go on at once.
        minutes: No run is started that would not end by then.

    Returns:
        Whether no run failed. One that did is named on stderr, and the others go on.
    """
    deadline = time.monotonic() + 60 * minutes
    results = read_results(path, Run) if path.exists() else {}
    flying: dict[Future[Record], Run] = {}
    failed: list[Run] = []
    with make_executor(workers) as executor:
        while True:
            while len(flying) < workers and time.monotonic() + _longest(results) < deadline:
                run = plan.next_run(results, [*flying.values(), *failed])
                if run is None:
                    break
                flying[executor.submit(execute, run)] = run
            if not flying:
                return not failed
            for future in wait(flying, return_when=FIRST_COMPLETED).done:
                run = flying.pop(future)
                if error := future.exception():
                    failed.append(run)
                    print(f"failed: {run} at {run.lr:g}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                    continue
                results[run] = future.result()
                append_result(path, run, results[run])
                print(f"[{len(results)} of {plan.longest}] {run} at {run.lr:g}: {_summary(results[run])}", flush=True)


def make_executor(workers: int) -> Executor:
    """Return one of processes that share the cores, or for a single worker of a thread of this process."""
    if workers == 1:
        return ThreadPoolExecutor(1)
    context = multiprocessing.get_context("spawn")  # CUDA does not work in forked processes
    threads = max(1, (os.cpu_count() or 1) // workers)
    return ProcessPoolExecutor(workers, context, initializer=_begin_worker, initargs=(threads,))


def _begin_worker(threads: int) -> None:
    """Leave the other workers their cores, and the terminal to the results."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)


def _longest(results: dict[Run, Record]) -> float:
    return MARGIN * max((record["seconds"] for record in results.values()), default=0.0)


def _summary(record: Record) -> str:
    scores = record["epochs"][-1]["scores"]
    cells = (f"{name} {next(iter(each.values())):.1f}" for name, each in scores.items())
    return f"{'  '.join(cells)}  ({record['seconds']:.0f} s)"
