"""Shared fixtures: tiny models with random weights, so that the tests run in any clone without a network."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tiny import BATCH, llama

import peft_sparsegrad  # noqa: F401


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def model():
    return llama()


@pytest.fixture
def batches():
    """Four batches of language modelling, with padding."""
    return [BATCH(seed) for seed in range(4)]
