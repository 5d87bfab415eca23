"""Two ranks under DeepSpeed ZeRO against one process on the same global batches."""

import engines
import pytest
import torch

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")

SCRIPT = "deepspeed_engine"
ENGINES = ["ZeRO-1", "ZeRO-2", "ZeRO-3", "accumulation, ZeRO-2", "accumulation, ZeRO-3"]


@pytest.mark.parametrize("method", engines.METHODS)
@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_train_what_one_process_does(ranks, one_process, engine, method):
    first, second = ranks.run("train_by_deepspeed", engine=engine, method=method)
    one = one_process(method, "accumulation" in engine)
    for name, tensor in first["state"].items():
        assert torch.equal(tensor, second["state"][name]), f"the ranks disagree on {name}"
        assert torch.allclose(tensor.double(), one["state"][name].double(), atol=1e-5), name
    assert first["state"].keys() == one["state"].keys()
