"""Keeps one notice of bitsandbytes off the terminal.

On a CPU with AVX512-BF16, importing bitsandbytes (0.50) reports that its kernels for 4-bit inference are not
installed. PEFT imports bitsandbytes, so the notice would precede every program, whether or not a weight has 4 bits.
"""

from __future__ import annotations

import logging


def _is_another(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")


logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_another)
