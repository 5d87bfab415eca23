"""Shared fixtures: tiny models with random weights, so that the tests run in any clone without a network."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the programs that the tests start, several at a time

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from ranks import Ranks


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--peft-source", metavar="PATH", help="checkout of PEFT whose own tests run for both methods")


def pytest_collectstart() -> None:
    """Prepare a process that runs tests. The one that only shares them out does not wait for these imports."""
    import torch

    import peft_sparsegrad  # noqa: F401

    torch.set_num_threads(1)  # tiny tensors: threads would wait for each other


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> None:
    """Leave what is there so far out of the collections of garbage, which each Trainer begins with.

    Without this each of them walks through all that is imported, which takes half a second.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def rank_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    server = Ranks(tmp_path_factory.mktemp("ranks"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def ranks(rank_server: Ranks, request: pytest.FixtureRequest) -> Callable[..., list[Any]]:
    """`Ranks.run` for the script `SCRIPT`, which lies beside the test module that names it."""
    return partial(rank_server.run, request.path.with_name(f"{request.module.SCRIPT}.py"))
