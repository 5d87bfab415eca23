"""Runs that torch's distributed checkpoints save on some ranks and that go on, on as many or on others."""

import pytest
import torch
from versions import needs_fsdp2_on_a_cpu

SCRIPT = "dcp"
CASES = [
    ("default", 2, 1),
    ("default", 1, 2),
    ("GradDrop held", 2, 1),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [
            ("LoRA", 2, 1),
            ("LoRA", 1, 2),
            ("default", 2, 2),
            ("not renewed", 2, 1),
            ("GradDrop", 2, 2),
            ("GradDrop", 2, 1),
            ("GradDrop", 1, 2),
            ("GradDrop held", 2, 2),
        ]
    ),
]


@needs_fsdp2_on_a_cpu
@pytest.mark.parametrize(("method", "saved_on", "resumed_on"), CASES)
def test_a_resumed_run_is_the_uninterrupted_one(ranks, tmp_path, method, saved_on, resumed_on):
    folder = str(tmp_path / "checkpoint")
    whole = ranks("save", world=saved_on, method=method, folder=folder)
    resumed = ranks("resume", world=resumed_on, method=method, folder=folder)
    for name, tensor in whole[0]["state"].items():
        for each in (*whole, *resumed):
            assert torch.allclose(each["state"][name].double(), tensor.double(), atol=1e-5), name
