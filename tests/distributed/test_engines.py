"""Two ranks under each engine against one process on the same global batches."""

import engines
import pytest
import torch

SCRIPT = "engines"


@pytest.mark.parametrize("method", engines.METHODS)
@pytest.mark.parametrize(
    "engine", ["DDP", "FSDP2", "FSDP2, offload", "FSDP2, accumulation", "FSDP2, accumulation, reduced each time"]
)
def test_two_ranks_train_what_one_process_does(ranks, one_process, engine, method):
    first, second = ranks.run("train_by_torch", engine=engine, method=method)
    one = one_process(method, "accumulation" in engine)
    for name, tensor in first["state"].items():
        assert torch.equal(tensor, second["state"][name]), f"the ranks disagree on {name}"
        assert torch.allclose(tensor.double(), one["state"][name].double(), atol=1e-5), name
    assert first["state"].keys() == one["state"].keys()
