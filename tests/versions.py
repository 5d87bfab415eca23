"""What the lower bounds of pyproject.toml lack, as marks for the tests that need it."""

import bitsandbytes
import pytest
import torch
import transformers
from packaging.version import Version

TORCH = Version(torch.__version__)
RESUMES_ON_CPU_RANKS = Version(transformers.__version__) >= Version("5.20")

needs_one_graph = pytest.mark.skipif(
    Version("2.7") > TORCH, reason="torch.compile of torch 2.6 makes several graphs of PEFT's own forward pass"
)
needs_grouped_mm = pytest.mark.skipif(Version("2.9") > TORCH, reason="transformers' `grouped_mm` needs torch 2.9")
needs_8_bit_optimizers_on_a_cpu = pytest.mark.skipif(
    Version(bitsandbytes.__version__) < Version("0.50"), reason="this bitsandbytes has optimizers for GPUs only"
)
needs_resuming_on_cpu_ranks = pytest.mark.skipif(
    not RESUMES_ON_CPU_RANKS,
    reason="this transformers cannot load the optimizer of several CPU ranks",
)
