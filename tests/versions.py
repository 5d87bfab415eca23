"""What the lower bounds of pyproject.toml lack, as marks for the tests that need it."""

import bitsandbytes
import pytest
import torch
import transformers
from packaging.version import Version

TORCH = Version(torch.__version__)
TRANSFORMERS = Version(transformers.__version__)
RESUMES_ON_CPU_RANKS = Version("5.20") <= TRANSFORMERS

needs_one_graph = pytest.mark.skipif(
    Version("2.7") > TORCH, reason="torch.compile of torch 2.6 makes several graphs of PEFT's own forward pass"
)
needs_export = pytest.mark.skipif(Version("2.7") > TORCH, reason="torch 2.6 does not say that a model is exported")
needs_fsdp2_on_a_cpu = pytest.mark.skipif(Version("2.7") > TORCH, reason="FSDP2 of torch 2.6 cannot run on a CPU")
needs_fsdp2_of_two_dtypes = pytest.mark.skipif(
    Version("2.8") > TORCH, reason="before torch 2.8 FSDP2 wants frozen weights in the dtype of those that train"
)
needs_grouped_mm = pytest.mark.skipif(Version("2.9") > TORCH, reason="transformers' `grouped_mm` needs torch 2.9")
needs_8_bit_optimizers_on_a_cpu = pytest.mark.skipif(
    Version(bitsandbytes.__version__) < Version("0.50"), reason="this bitsandbytes has optimizers for GPUs only"
)
needs_resuming_on_cpu_ranks = pytest.mark.skipif(
    not RESUMES_ON_CPU_RANKS,
    reason="this transformers cannot load the optimizer of several CPU ranks",
)
needs_deepspeed_without_a_scheduler = pytest.mark.skipif(
    Version("5.2") > TRANSFORMERS,
    reason="the Trainer of transformers 5.1 leaves DeepSpeed out unless its configuration has a scheduler",
)
needs_splitting_on_loading = pytest.mark.skipif(
    Version("5.16") > TRANSFORMERS, reason="before transformers 5.16 `DistributedConfig` takes no number of devices"
)
