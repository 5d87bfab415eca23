"""Shared fixtures: tiny models with random weights, so that the tests run in any clone without a network."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the programs that the tests start, several at a time

import pytest
import torch

import peft_sparsegrad  # noqa: F401

torch.set_num_threads(1)  # tiny tensors: threads would wait for each other


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
