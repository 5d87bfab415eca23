"""Two processes under torchrun with gloo against one process on the same global batches.

One start of torchrun serves all cases.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fresh import environment

sys.path.insert(0, str(Path(__file__).parent))
import ddp_script

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    env = environment(PYTHONPATH=os.pathsep.join([str(HERE.parent), str(HERE.parent.parent)]))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launcher, str(HERE / "ddp_script.py"), str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(out / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", ddp_script.RUNS)
def test_two_ranks_train_the_same_adapter_as_one(ranks, name, tmp_path):
    one = ddp_script.run(name, tmp_path)
    first, second = (rank[name] for rank in ranks)
    for key, value in first["state"].items():
        assert torch.equal(value, second["state"][key]), f"the ranks disagree on {key}"
    if "renewing" in name:
        counted = {int(value) for key, value in one["state"].items() if key.endswith(".steps")}
        assert counted == {6}, "both renewals lie within the run"
    for layer, delta in one["deltas"].items():
        assert torch.equal(first["supports"][layer], one["supports"][layer])
        assert delta.abs().max() > 1e-3
        assert torch.allclose(first["deltas"][layer], delta, atol=1e-5), (first["deltas"][layer] - delta).abs().max()


def test_resumed_run_of_two_ranks_is_the_uninterrupted_one(ranks):
    """Bit for bit, from the files that rank 0 has written, which hold the gradient sums of both."""
    for rank in ranks:
        result = rank["trainer resumed"]
        assert all(torch.equal(result["state"][key], value) for key, value in result["through"].items())
