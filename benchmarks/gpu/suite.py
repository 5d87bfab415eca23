"""The tests marked `gpu`, run where their plug-ins are not installed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from experiments.text_files import make_folder

ROOT = Path(__file__).parents[2]
GPU_TESTS = (
    "tests/gpu",
    "tests/functional/test_streams.py",
    "tests/functional/test_masks_apply.py",
    "tests/benchmarks/test_gpu_bench.py",
)


def run_gpu_tests(log: Path) -> dict[str, Any]:
    """Run the tests, with what pytest prints in a file.

    Args:
        log: The file.

    Returns:
        pytest's exit status, its last line and the seconds.
    """
    make_folder(log.parent)
    started = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-m", "gpu", "-q", "--durations=10", *GPU_TESTS]
    with log.open("w", encoding="utf-8") as output:
        status = subprocess.run(command, cwd=ROOT, stdout=output, stderr=output, check=False).returncode
    printed = log.read_text("utf-8").strip().splitlines()
    summary = printed[-1] if printed else ""
    print(f"tests: {summary} (pytest's output is in {log})", flush=True)
    return {"status": status, "summary": summary, "seconds": time.perf_counter() - started}
