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


def test_only_the_notice_is_dropped(caplog):
    for message in (NOTICE, "4-bit weights of this shape are not supported: %s."):
        logging.getLogger(LOGGER).warning(message, "no kernels")
    logging.getLogger("bitsandbytes").warning(NOTICE, "said by another part")
    assert [record.name for record in caplog.records] == [LOGGER, "bitsandbytes"]
    assert caplog.records[0].getMessage().startswith("4-bit weights of this shape")


@pytest.mark.slow
def test_import_prints_nothing():
    command = [sys.executable, "-c", "import peft_sparsegrad"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout + done.stderr == ""
