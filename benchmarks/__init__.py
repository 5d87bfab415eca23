"""Benchmarks of SparseGrad: `python -m benchmarks --help`."""

import os

# The profiler, which counts allocations on the CPU, reports every start and stop on the terminal otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import peft_sparsegrad  # noqa: F401 - before peft, so that bitsandbytes' notice stays off the terminal
