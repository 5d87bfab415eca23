"""The notice of bitsandbytes about kernels that are not installed stays off the terminal, and nothing else does."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
from fresh import environment

import peft_sparsegrad  # noqa: F401

NOTICE = "Failed to load CPU gemm_4bit_forward from kernels-community: %s."
LOGGER = "bitsandbytes.backends.cpu.ops"


@pytest.mark.parametrize(
    ("name", "message", "passes"),
    [
        (LOGGER, NOTICE, False),
        (LOGGER, "4-bit weights of this shape are not supported: %s.", True),
        ("bitsandbytes", NOTICE, True),
    ],
)
def test_only_the_notice_is_dropped(name, message, passes):
    logger = logging.getLogger(name)
    record = logger.makeRecord(name, logging.WARNING, "ops.py", 1, message, ("no kernels",), None)
    assert bool(logger.filter(record)) == passes


@pytest.mark.slow
def test_import_prints_nothing():
    command = [sys.executable, "-c", "import peft_sparsegrad"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout + done.stderr == ""
